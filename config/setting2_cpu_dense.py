"""The dense twin of setting2_cpu.

launch    python train.py config/setting2_cpu_dense.py
hardware  2 CPU cores
time      not measured
loss      after 800 steps that of setting2_cpu within 0.03 bits per byte (results/factor_init.md)
"""

from config.setting2_cpu import *  # noqa: F403

out_dir = "out/setting2_cpu_dense"
lowdim = {}
