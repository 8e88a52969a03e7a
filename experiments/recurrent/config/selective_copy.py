"""The paper's selective copy task: 16 tokens scattered among 4,096 of noise (arXiv 2402.14746).

launch    python -m experiments.recurrent.train experiments/recurrent/config/selective_copy.py --compile=block
hardware  a GPU, for hours
time      not run; published: 17,300 steps of 64 sequences
accuracy  published: 99.6 % of the tokens
"""

from experiments.recurrent.config.copy import *  # noqa: F403
from experiments.recurrent.config.copy import recurrent

out_dir = "out/selective_copy"
dataset = "selective_copy"
recurrent = recurrent | dict(alpha_learned=False)  # as published: the noise is too strong to learn it
max_steps = 20_000
decay_share = 1 / max_steps
eval_interval = 500
