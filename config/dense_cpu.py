"""The dense twin of lpa_cpu.

launch    python train.py config/dense_cpu.py
hardware  2 CPU cores
time      see `python bench.py config/lpa_cpu.py --mode=train`
loss      not measured over all steps; 2.10 bits per byte with --max_steps=300 (results/optimizers.md)
"""

from config.lpa_cpu import *  # noqa: F403

out_dir = "out/dense_cpu"
lowdim = {}
