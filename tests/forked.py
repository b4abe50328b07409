"""Axolotl's command line in a forked child: the ten seconds of its import are paid once, and every run starts clean."""

import atexit
import contextlib
import gc
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any

import axolotl.cli.preprocess  # noqa: F401 (imported before forking, as below)
import axolotl.cli.train  # noqa: F401
import axolotl.core.builders  # noqa: F401
import axolotl.integrations.liger.plugin  # noqa: F401
import axolotl.monkeypatch.attention.sdpa_varlen  # noqa: F401
import axolotl.prompt_strategies.chat_template  # noqa: F401
import axolotl.train  # noqa: F401
import deepspeed  # noqa: F401 (accelerate imports it at the end of every run, and it MLflow)
import jsonschema  # noqa: F401
import liger_kernel.transformers.monkey_patch  # noqa: F401 (axolotl's Liger plugin imports it at each start)
import numpy as np
import torch
import torch.nn.attention.varlen  # noqa: F401
import torch.utils.tensorboard  # noqa: F401 (every recipe logs to it)
import torchao  # noqa: F401
import tqdm
import wandb
from accelerate.state import AcceleratorState
from axolotl.cli import main as axolotl_cli
from axolotl.integrations.base import PluginManager
from axolotl.logging_config import configure_logging
from axolotl.utils.samplers.multipack import pack_parallel

import fastdora.plugin.plugin  # noqa: F401
from fastdora.plugin.keys import input_schema

torch.set_num_threads(1)
# Compiled and put together once, before forking.
pack_parallel(np.array([3, 5, 2], dtype=np.int32), 8, 100, 8, num_processes=1)
input_schema(("fastdora.FastDoraPlugin", "axolotl.integrations.liger.LigerPlugin"))

# Where each child has its temporary files: it ends without Python's own clearing up, or is killed.
_temporary: dict[int, str] = {}


def axolotl_command(*argv: str) -> tuple[int, str]:
    """Run `axolotl ARGV...`; return its exit code and all that it printed."""
    return finish(start(argv))


def axolotl_processes(count: int, *argv: str) -> list[tuple[int, str]]:
    """Run `axolotl ARGV...` in `count` processes as torchrun would on one machine; each one's exit code and output.

    The recipe must name the plugin bench.plugins.CpuProcesses. When one process fails the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [start(argv, shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(count)]
    statuses: dict[int, int] = {}
    while len(statuses) < count:
        for pid, _ in children:
            if pid not in statuses and (done := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = done[1]
        if any(statuses.values()):  # the others would wait for it, up to half an hour
            for pid, _ in children:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
                    statuses[pid] = os.waitpid(pid, 0)[1]
        time.sleep(0.02)
    return [finish(child, statuses[child[0]]) for child in children]


def start(
    argv: Sequence[str], env: dict[str, Any] | None = None, main: Callable[[], None] = axolotl_cli.main
) -> tuple[int, IO[str]]:
    """Fork a child that runs `axolotl ARGV...` with these additions to its environment; its pid and its output.

    main: what it runs in axolotl's place.
    """
    gc.freeze()  # garbage collections in the child then leave the parent's pages alone
    output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    folder = tempfile.mkdtemp(prefix="f-")
    child = os.fork()
    if child:
        _temporary[child] = folder
        return child, output
    _temporary.clear()  # the parent's
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.environ |= {key: str(value) for key, value in (env or {}).items()}
    os.environ["AXOLOTL_DATASET_NUM_PROC"] = "0"
    # tqdm's own lock is one semaphore of all forked processes: a child that was killed with it would stop all others.
    tqdm.tqdm.set_lock(threading.RLock())
    # accelerate keeps for its lifetime how a process takes part in training: here how pytest's process did.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    configure_logging()  # its handlers write to the streams that pytest has replaced
    PluginManager.get_instance().plugins.clear()  # what a test has loaded in this process would come before a recipe's
    sys.argv = ["axolotl", *argv]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        print(stop.code)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        if wandb.run:
            wandb.finish()  # a process that ends as usual does
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def finish(child: tuple[int, IO[str]], status: int | None = None) -> tuple[int, str]:
    """The exit code (minus the signal where one ended it) and the output of a child, waited for without a status."""
    pid, output = child
    if status is None:
        status = os.waitpid(pid, 0)[1]
    shutil.rmtree(_temporary.pop(pid, ""), ignore_errors=True)
    with output:
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


@atexit.register
def clear_up() -> None:
    """What the children left that nobody finished, because they were killed or are another test's to wait for."""
    while _temporary:
        shutil.rmtree(_temporary.popitem()[1], ignore_errors=True)
