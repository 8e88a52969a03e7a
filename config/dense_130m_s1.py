"""The dense twin of lpa_130m_s1: 135M parameters, the paper's learning rate for it.

launch    torchrun --nproc_per_node=8 train.py config/dense_130m_s1.py
hardware  as lpa_130m_s1
time      about 24 hours of one A100 at 40 % of its 19.5 TFLOP/s in fp32, by arithmetic; not measured here
loss      paper: test perplexity 14.61 per LLaMA-2 token, which is 2.68 nats; not measured here
"""

from config.lpa_130m_s1 import *  # noqa: F403

out_dir = "out/dense_130m_s1"
lowdim = {}
learning_rate = 8e-4
