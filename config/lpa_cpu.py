"""LPA on a laptop: 1.2M parameters learn the source code of Python's standard library, byte by byte.

launch    python train.py config/lpa_cpu.py
hardware  2 CPU cores
time      269 s of training (AMD EPYC with bfloat16 units, torch 2.13), and seconds to evaluate
loss      1.097 nats a byte, 1.582 bits per byte on the whole val split, with Python 3.11's library
"""

out_dir = "out/lpa_cpu"
dataset = "pystdlib"  # prepares itself, without a network

n_layer = 3
n_head = 3
n_embd = 192
ffn_dim = 768
block_size = 256
lowdim = dict(q=48, k=48, v=48, o=48)

# What learns fast in few steps, beside LPA: see config/speedrun_shakespeare.py
mlp = "relu2"
rope_theta = 1000.0
qk_norm = True
zero_init = True

batch_size = 8
tokens_per_step = 8 * block_size  # 2,048
max_steps = 3600  # 7.4M tokens
optimizer = "muon"
learning_rate = 2.5e-3
weight_decay = 0.1
schedule = "wsd"
decay_share = 1.0  # linear from the first step
dtype = "auto"  # bfloat16 where the CPU has units for it: half the time
eval_interval = 0  # only at the end, on the whole split
log_interval = 50
