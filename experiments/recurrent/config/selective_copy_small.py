"""Selective copying on a CPU: 4 tokens scattered among 64 of noise, starting with 16. Here alpha is not learned.

launch    python -m experiments.recurrent.train experiments/recurrent/config/selective_copy_small.py
hardware  2 CPU cores
time      523 s of training on 1 thread of a shared machine, mean of 3 seeds
accuracy  0.994 of the tokens, mean of 3 seeds (results/recurrent_selective_copy_small.md)
"""

from experiments.recurrent.config.copy_small import *  # noqa: F403
from experiments.recurrent.config.copy_small import recurrent

out_dir = "out/selective_copy_small"
dataset = "selective_copy"
task = dict(keep=4, noise=64, start_noise=16, alphabet=10, rates="constant")
block_size = 64 + 2 * 4
recurrent = recurrent | dict(alpha_learned=False)  # as published: the noise is too strong to learn it
max_steps = 4000
decay_share = 0.3
eval_interval = 100
save_interval = 500
