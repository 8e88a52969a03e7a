"""The dense twin of lpa_130m: 134M parameters, the paper's learning rate for it.

launch    torchrun --nproc_per_node=8 train.py config/dense_130m.py
hardware  as lpa_130m
time      about 4 hours of one A100 at 40 % of its 312 TFLOP/s in bf16, by arithmetic; not measured here
loss      paper: test perplexity 18.84 per LLaMA-2 token, which is 2.94 nats; not measured here
"""

from config.lpa_130m import *  # noqa: F403

out_dir = "out/dense_130m"
lowdim = {}
learning_rate = 1e-3
