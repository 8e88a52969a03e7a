"""The small case in which self-guided training was shown (arXiv 2406.16450, figure 3), on a CPU: 4 layers, rank 128.

launch    python -m experiments.structured.train experiments/structured/config/structured_small.py --lowdim.up=128
hardware  2 CPU cores
time      not measured
loss      published, WikiText-103: no spike where the unguided run has one, and a loss between it and dense

Published: 3,000 steps; rate and batch are not known. results/structured_ffn_small.md has dense, unguided and guided.
"""

from experiments.structured.config.structured import *  # noqa: F403

out_dir = "out/structured_small"
dataset = "wikitext103"

n_layer = 4
block_size = 128

batch_size = 4
tokens_per_step = 4 * 128
max_steps = 800
warmup_steps = 80
dtype = "auto"
eval_interval = 0
eval_tokens = 200_000
