"""The dense twin of lpa_cpu.

launch    python train.py config/dense_cpu.py
hardware  2 CPU cores
time      see `python bench.py config/lpa_cpu.py --mode=train`
loss      see results/optimizers.md, after 300 steps
"""

from config.lpa_cpu import *  # noqa: F403

out_dir = "out/dense_cpu"
lowdim = {}
