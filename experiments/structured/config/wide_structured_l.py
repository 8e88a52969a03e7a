"""Wide and structured, 464M parameters: half as wide heads, a feed-forward of rank 768 (arXiv 2406.16450, table 2).

launch    torchrun --nproc_per_node=8 train.py experiments/structured/config/wide_structured_l.py
hardware  8 GPUs of 80 GB
time      not measured
loss      published: perplexity 14.27 after 23.4B tokens of RefinedWeb; not measured here
"""

from experiments.structured.config.structured import *  # noqa: F403
from experiments.structured.config.structured import tokens_per_step

out_dir = "out/wide_structured_l"

n_layer = 24
n_head = 12
n_kv_head = 4
n_embd = 1536
attn_dim = 768
ffn_dim = 7424
lowdim = dict(up=768, down=768)
learning_rate = 2.5e-4
max_steps = 23_360_000_000 // tokens_per_step
min_lr = learning_rate / 10
warmup_steps = max_steps // 10
