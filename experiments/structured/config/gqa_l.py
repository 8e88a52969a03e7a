"""Grouped-query attention at 729M parameters: what wide_structured_l is compared with (arXiv 2406.16450, table 2).

launch    torchrun --nproc_per_node=8 train.py experiments/structured/config/gqa_l.py
hardware  8 GPUs of 80 GB
time      not measured
loss      published: perplexity 14.40 after 14.6B tokens of RefinedWeb; not measured here
"""

from experiments.structured.config.structured import *  # noqa: F403

out_dir = "out/gqa_l"
n_layer = 24
n_head = 12
n_kv_head = 2
n_embd = 1536
ffn_dim = 7424
learning_rate = 2.5e-4
min_lr = 2.5e-5
max_steps = 27_809  # 14.6B tokens
warmup_steps = 2_780
