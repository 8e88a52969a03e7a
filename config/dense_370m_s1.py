"""The dense twin of lpa_370m_s1: 369M parameters, the paper's learning rate for it.

launch    torchrun --nproc_per_node=8 train.py config/dense_370m_s1.py
hardware  as lpa_370m_s1
time      about 62 hours of one A100 at 40 % of its 19.5 TFLOP/s in fp32, by arithmetic; not measured here
loss      paper: test perplexity 13.65 per LLaMA-2 token, which is 2.61 nats; not measured here
"""

from config.lpa_370m_s1 import *  # noqa: F403

out_dir = "out/dense_370m_s1"
lowdim = {}
learning_rate = 8e-4
