"""The plain twin of copy.py, with two layers: it attends to the full sequence, at quadratic cost.

launch    python -m experiments.recurrent.train experiments/recurrent/config/copy_gpt.py
hardware  a GPU
time      not run
accuracy  not run; the paper has no such run
"""

from experiments.recurrent.config.copy import *  # noqa: F403

out_dir = "out/copy_gpt"
model = "gpt"
n_layer = 2  # induction heads need two
