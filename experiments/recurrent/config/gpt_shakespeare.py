"""The plain twin of recurrent_shakespeare.py: as many parameters, attention to the full sequence.

launch    python -m experiments.recurrent.train experiments/recurrent/config/gpt_shakespeare.py
          the same with --n_layer=6 --out_dir=out/gpt_shakespeare_6
hardware  a GPU
time      not run
loss      not run; published: 1.5697, and 1.4815 for 6 layers
"""

from experiments.recurrent.config.recurrent_shakespeare import *  # noqa: F403

out_dir = "out/gpt_shakespeare"
model = "gpt"
