"""Axolotl's command line in a forked child: the ten seconds of its import are paid once, and every run starts clean."""

import contextlib
import gc
import os
import sys
import tempfile
import traceback

import axolotl.cli.preprocess  # noqa: F401 (imported before forking, as below)
import axolotl.core.builders  # noqa: F401
import axolotl.train  # noqa: F401
import numpy as np
import torch
import torchao  # noqa: F401
from axolotl.cli import main as axolotl_cli
from axolotl.logging_config import configure_logging
from axolotl.utils.samplers.multipack import pack_parallel

import fastdora.plugin  # noqa: F401

torch.set_num_threads(1)
pack_parallel(np.array([3, 5, 2]), 8, 100, 8, num_processes=1)  # compiled once, before forking


def axolotl_command(*argv: str) -> tuple[int, str]:
    """Run `axolotl ARGV...`; return its exit code and all that it printed."""
    gc.freeze()  # garbage collections in the child then leave the parent's pages alone
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = os.fork()
        if not child:
            os.environ["AXOLOTL_DATASET_NUM_PROC"] = "0"
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            configure_logging()  # its handlers write to the streams that pytest has replaced
            sys.argv = ["axolotl", *argv]
            code = 1
            try:
                axolotl_cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
                print(stop.code)
            except BaseException:
                traceback.print_exc()
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()
