"""The dense twin of lpa_370m: 368M parameters, the paper's learning rate for it.

launch    torchrun --nproc_per_node=8 train.py config/dense_370m.py
hardware  as lpa_370m
time      about 32 hours of one A100 at 40 % of its 312 TFLOP/s in bf16, by arithmetic; not measured here
loss      paper: test perplexity 12.10 per LLaMA-2 token, which is 2.49 nats; not measured here
"""

from config.lpa_370m import *  # noqa: F403

out_dir = "out/dense_370m"
lowdim = {}
learning_rate = 1e-3
