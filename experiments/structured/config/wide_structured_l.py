"""Wide and structured, 464M parameters: half as wide heads, a feed-forward of rank 768 (arXiv 2406.16450, table 2).

launch    torchrun --nproc_per_node=8 train.py experiments/structured/config/wide_structured_l.py
hardware  8 GPUs of 80 GB
time      not measured
loss      published: perplexity 14.27 after 23.4B tokens of RefinedWeb; not measured here
"""

from experiments.structured.config.gqa_l import *  # noqa: F403

out_dir = "out/wide_structured_l"
n_kv_head = 4
attn_dim = 768
lowdim = dict(up=768, down=768)
max_steps = 44_555  # 23.4B tokens
warmup_steps = 4_455
