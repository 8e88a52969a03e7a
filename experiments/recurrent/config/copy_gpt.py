"""A plain transformer of two layers on the task of config/copy.py: it sees all of the text, at quadratic cost.

launch    python train.py config/copy_gpt.py
hardware  a GPU
time      not run
accuracy  not run; the paper has no such run
"""

from config.copy import *  # noqa: F403

out_dir = "out/copy_gpt"
model = "gpt"
n_layer = 2  # induction heads need two
