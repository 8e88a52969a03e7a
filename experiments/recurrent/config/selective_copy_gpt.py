"""A plain transformer of two layers on the task of config/selective_copy.py.

launch    python train.py config/selective_copy_gpt.py
hardware  a GPU
time      not run
accuracy  not run; the paper has no such run
"""

from config.selective_copy import *  # noqa: F403

out_dir = "out/selective_copy_gpt"
model = "gpt"
n_layer = 2
