"""Grouped-query attention at 335M parameters: what wide_structured_m is compared with (arXiv 2406.16450, table 2).

launch    torchrun --nproc_per_node=8 train.py experiments/structured/config/gqa_m.py
hardware  8 GPUs of 80 GB
time      not measured
loss      published: perplexity 18.23 after 6.7B tokens of RefinedWeb; not measured here
"""

from experiments.structured.config.structured import *  # noqa: F403

out_dir = "out/gqa_m"
n_layer = 24
n_head = 16
n_kv_head = 4
n_embd = 1024
ffn_dim = 4864
learning_rate = 3e-4
min_lr = 3e-5
max_steps = 12_779  # 6.7B tokens
warmup_steps = 1_277
