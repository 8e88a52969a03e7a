"""The dense twin of lpa_cpu.

launch    python train.py config/dense_cpu.py
hardware  2 CPU cores
time      about a tenth more than lpa_cpu (`python bench.py config/lpa_cpu.py --mode=train`: 0.93)
loss      not measured at this length; after 800 steps that of lpa_cpu within 0.03 (results/factor_init.md)
"""

from config.lpa_cpu import *  # noqa: F403

out_dir = "out/dense_cpu"
lowdim = {}
