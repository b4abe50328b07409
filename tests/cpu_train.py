"""`python tests/cpu_train.py ...` is `python -m finlora.train.run ...` on a machine that seems to have eight GPUs.

The recipe must name the plugin cpu_processes.CpuProcesses.
"""

import os
import tempfile

from finlora.core import machine
from finlora.core.errors import run
from finlora.train import run as train

machine.gpus = lambda: [("CPU", 8.0, 8.0)] * 8
with tempfile.TemporaryDirectory() as folder:
    os.environ["TMPDIR"] = folder  # where torchrun leaves a folder of logs
    run(train.main)
