"""GPT-2 small's shape, trained as speedrun_shakespeare is: the time to a val loss that nanogpt_124m needs longer for.

launch    python -m experiments.sweep config/speedrun_gpu.py --seeds=3 --target=4.0
hardware  one GPU of 80 GB
time      not measured: the rate is modded-nanogpt's, brought to our scale
loss      not measured
"""

from config.nanogpt_124m import *  # noqa: F403

out_dir = "out/speedrun_gpu"

norm = "rmsnorm"
norm_eps = 1e-6
mlp = "relu2"
pos = "rope"
qk_norm = True
zero_init = True
tie_embeddings = False

optimizer = "muon"
schedule = "wsd"
decay_share = 0.5
tokens_per_step = 96 * 1024
max_steps = 2500
learning_rate = 3e-3
min_lr = 0.0
warmup_steps = 0
weight_decay = 0.0
eval_interval = 100
save_interval = max_steps
