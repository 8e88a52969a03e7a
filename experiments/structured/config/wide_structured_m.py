"""Wide and structured, 219M parameters: half as wide heads, a feed-forward of rank 512 (arXiv 2406.16450, table 2).

launch    torchrun --nproc_per_node=8 train.py experiments/structured/config/wide_structured_m.py
hardware  8 GPUs of 80 GB
time      not measured
loss      published: perplexity 17.89 after 10.6B tokens of RefinedWeb; not measured here
"""

from experiments.structured.config.structured import *  # noqa: F403
from experiments.structured.config.structured import tokens_per_step

out_dir = "out/wide_structured_m"

n_layer = 24
n_head = 8
n_kv_head = 4
n_embd = 1024
attn_dim = 512
ffn_dim = 4864
lowdim = dict(up=512, down=512)
learning_rate = 3e-4
max_steps = 10_580_000_000 // tokens_per_step
min_lr = learning_rate / 10
warmup_steps = max_steps // 10
