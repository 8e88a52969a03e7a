"""The plain twin of selective_copy.py, with two layers.

launch    python -m experiments.recurrent.train experiments/recurrent/config/selective_copy_gpt.py
hardware  a GPU
time      not run
accuracy  not run; the paper has no such run
"""

from experiments.recurrent.config.selective_copy import *  # noqa: F403

out_dir = "out/selective_copy_gpt"
model = "gpt"
n_layer = 2
