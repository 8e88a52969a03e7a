"""LPA at 370M, the paper's setting 1 (table 9): 319M parameters where dense_370m_s1 has 369M.

launch    torchrun --nproc_per_node=8 train.py config/lpa_370m_s1.py
hardware  8 GPUs of 24 GB or more
time      about 53 hours of one A100 at 40 % of its 19.5 TFLOP/s in fp32, by arithmetic; not measured here
loss      paper: test perplexity 12.89 (dense 13.65) per LLaMA-2 token, which is 2.56 nats; not measured here
"""

from config.lpa_130m_s1 import *  # noqa: F403 (setting 1: norms, ReLU, positions, biases, optimizer)

out_dir = "out/lpa_370m_s1"

n_layer = 24
n_head = 8
n_embd = 1024
ffn_dim = 4096
block_size = 1024
lowdim = dict(q=256, k=256, v=256, o=256)

batch_size = 6
tokens_per_step = 96 * block_size  # 98,304
max_steps = 8 * 100_000_000 // tokens_per_step  # 8 epochs of 0.1B tokens: 8,138
