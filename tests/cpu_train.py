"""`python tests/cpu_train.py ...` is `python -m finlora train ...` on a machine that seems to have eight GPUs.

The recipe must name the plugin bench.plugins.CpuProcesses.
"""

import os
import sys
import tempfile

from finlora import cli
from finlora.core import machine

machine.gpus = lambda: [("CPU", 8.0, 8.0)] * 8
with tempfile.TemporaryDirectory() as folder:
    os.environ["TMPDIR"] = folder  # where torchrun leaves a folder of logs
    cli.main(["train", *sys.argv[1:]])
