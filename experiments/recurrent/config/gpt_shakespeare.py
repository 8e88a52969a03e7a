"""The plain twin of config/recurrent_shakespeare.py: as many parameters, attention to the whole text.

launch    python train.py config/gpt_shakespeare.py
          python train.py config/gpt_shakespeare.py --n_layer=6 --out_dir=out/gpt_shakespeare_6       6 layers
hardware  a GPU
time      not run
loss      not run; published: 1.5697, and 1.4815 for 6 layers
"""

from config.recurrent_shakespeare import *  # noqa: F403

out_dir = "out/gpt_shakespeare"
model = "gpt"
