"""speedrun_shakespeare with rank 32 in all four projections: 673,152 parameters.

launch    python -m experiments.sweep config/speedrun_shakespeare_lpa.py --seeds=3 --target=1.90
hardware  2 CPU cores
time      9.6 s of training, the median of three seeds
loss      1.90 after 280 steps (results/time_to_loss_shakespeare_char.md)
"""

from config.speedrun_shakespeare import *  # noqa: F403

out_dir = "out/speedrun_shakespeare_lpa"
lowdim = dict(q=32, k=32, v=32, o=32)
max_steps = 300
learning_rate = 8e-3
save_interval = max_steps
