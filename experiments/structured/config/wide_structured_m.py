"""Wide and structured, 219M parameters: half as wide heads, a feed-forward of rank 512 (arXiv 2406.16450, table 2).

launch    torchrun --nproc_per_node=8 train.py experiments/structured/config/wide_structured_m.py
hardware  8 GPUs of 80 GB
time      not measured
loss      published: perplexity 17.89 after 10.6B tokens of RefinedWeb; not measured here
"""

from experiments.structured.config.gqa_m import *  # noqa: F403

out_dir = "out/wide_structured_m"
n_head = 8
attn_dim = 512
lowdim = dict(up=512, down=512)
max_steps = 20_179  # 10.6B tokens
warmup_steps = 2_017
