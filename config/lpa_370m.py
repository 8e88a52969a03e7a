"""LPA at 370M, the paper's setting 2 (table 9): 318M parameters where dense_370m has 368M.

launch    torchrun --nproc_per_node=8 train.py config/lpa_370m.py
hardware  8 GPUs of 24 GB or more; any number that divides 120 sequences works, accumulation follows
time      about 27 hours of one A100 at 40 % of its 312 TFLOP/s in bf16, by arithmetic; not measured here
loss      paper: test perplexity 11.68 (dense 12.10) per LLaMA-2 token, which is 2.46 nats; not measured here
"""

from config.lpa_130m import *  # noqa: F403 (setting 2: norms, SwiGLU, RoPE, optimizer, bfloat16)

out_dir = "out/lpa_370m"  # and 6.8B tokens of the Pile: --tokens=6.8e9 in the command that lpa_130m names

n_layer = 24
n_head = 16
n_embd = 1024
ffn_dim = 2736
block_size = 512
lowdim = dict(q=256, k=256, v=256, o=256)

batch_size = 15
tokens_per_step = 120 * block_size  # 61,440
max_steps = 6_800_000_000 // tokens_per_step  # one pass over 6.8B tokens: 110,677
learning_rate = 8e-4
recompute = "elementwise"  # 0.62 MB of activations per token at T 1024 instead of 1.27 MB: see docs/training.md
