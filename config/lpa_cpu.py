"""LPA on a laptop: 1.6M parameters learn the source code of Python's standard library, byte by byte.

launch    python train.py config/lpa_cpu.py
hardware  2 CPU cores
time      TIME
loss      LOSS
"""

out_dir = "out/lpa_cpu"
dataset = "pystdlib"  # prepares itself, without a network

n_layer = 4
n_head = 4
n_embd = 192
block_size = 256
lowdim = dict(q=48, k=48, v=48, o=48)

batch_size = 8  # 2,048 tokens a step
max_steps = 1000
learning_rate = 3e-3
min_lr = 1e-4
warmup_steps = 50
weight_decay = 0.1
eval_interval = 250
log_interval = 20
