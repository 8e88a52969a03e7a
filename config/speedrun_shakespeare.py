"""The fastest way here to a val loss of 1.90 on Shakespeare by characters: nanogpt_shakespeare's shape, batch and data.

launch    python -m experiments.sweep config/speedrun_shakespeare.py --seeds=3 --target=1.90
hardware  2 CPU cores
time      7.1 s of training, the median of three seeds
loss      1.90 after 220 or 240 steps (results/time_to_loss_shakespeare_char.md)
"""

from config.nanogpt_shakespeare import *  # noqa: F403

out_dir = "out/speedrun_shakespeare"

# 804,224 parameters: normed queries and keys, a squared ReLU, blocks and head that start at zero
norm = "rmsnorm"
norm_eps = 1e-6
mlp = "relu2"
pos = "rope"
rope_theta = 1000.0  # of 64 positions the slowest channels should turn, too
qk_norm = True
zero_init = True
tie_embeddings = False

optimizer = "muon"
schedule = "wsd"
decay_share = 1.0  # linear from the first step
max_steps = 240
learning_rate = 8e-3
min_lr = 0.0
warmup_steps = 0
weight_decay = 0.0
eval_interval = 20
dtype = "auto"
save_interval = max_steps
