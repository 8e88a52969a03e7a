"""The paper's setting 2 made small for 2 CPU cores: AdamW, SwiGLU, RoPE, no tricks. A sweep of factor_init uses it.

launch    python train.py config/setting2_cpu.py
hardware  2 CPU cores
time      265 s of training, and 20 s to evaluate (AMD EPYC, torch 2.13, with MKL's products: see products.py)
loss      1.309 nats a byte, 1.889 bits per byte on the whole val split, with Python 3.11's library
"""

out_dir = "out/setting2_cpu"
dataset = "pystdlib"  # prepares itself, without a network

n_layer = 4
n_head = 4
n_embd = 192
block_size = 128
lowdim = dict(q=48, k=48, v=48, o=48)

batch_size = 4
tokens_per_step = 4 * block_size  # 512: on a CPU many small steps learn more than few large ones
max_steps = 4200  # 2.2M tokens
learning_rate = 8e-4
min_lr = 8e-5
warmup_steps = 50
weight_decay = 0.1
eval_interval = 0  # only at the end, on the whole split
log_interval = 100
