"""The dense twin of lpa_3b: 3.23B parameters, the paper's learning rate for it.

launch    torchrun --nproc_per_node=8 train.py config/dense_3b.py
hardware  as lpa_3b
time      about 2,300 hours of one A100 at 40 % of its 312 TFLOP/s in bf16, by arithmetic; not measured here
loss      paper: test perplexity 6.45 per LLaMA-2 token, which is 1.86 nats; not measured here
"""

from config.lpa_3b import *  # noqa: F403

out_dir = "out/dense_3b"
lowdim = {}
learning_rate = 3e-4
