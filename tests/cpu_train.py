"""`python tests/cpu_train.py ...` is `python -m tools.train ...` on a machine that seems to have eight GPUs.

The recipe must name the plugin cpu_processes.CpuProcesses.
"""

import os
import tempfile

from tools import checks, train
from tools.cli import run

checks.gpus = lambda: [("CPU", 8.0, 8.0)] * 8
with tempfile.TemporaryDirectory() as folder:
    os.environ["TMPDIR"] = folder  # where torchrun leaves a folder of logs
    run(train.main)
