"""`python tests/cpu_train.py ...` is `python -m tools.train ...` on a machine that seems to have eight GPUs.

The recipe must name the plugin cpu_processes.CpuProcesses.
"""

from tools import checks, train
from tools.cli import run

checks.gpus = lambda: [("CPU", 8.0, 8.0)] * 8
run(train.main)
