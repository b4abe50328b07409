"""`python -m MODULE` in a forked child of one process that has imported axolotl: ten seconds saved at each command.

One such process serves all of pytest's. The command's own modules are imported anew, from the copy of the house. What
a test asks of the process itself, such as its answer to Ctrl-C, needs a real one.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OURS = ("finlora", "eval", "fastdora", "bench")  # they know the folder that they were imported from
SOCKET, LOCK = "commands", "commands.lock"


def folder() -> Path:
    """That of the run: tests/conftest.py makes it, for all of pytest's processes."""
    return Path(tempfile.gettempdir())


def begin(session: int) -> None:
    """Start the server unless another process has; it ends with the process `session`. Does not wait for it."""
    lock = (folder() / LOCK).open("w")  # held by the server as long as it lives
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
        code += f"import commands; commands.serve({session}, {lock.fileno()})"
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder() / f"{SOCKET}.log").open("w"),
            start_new_session=True,  # Ctrl-C is the session's: the server ends with it
            pass_fds=[lock.fileno()],
        )
    lock.close()


def end() -> None:
    """End the server and wait until it has."""
    if not (folder() / LOCK).exists():
        return
    with contextlib.suppress(RuntimeError, OSError), connected() as server:
        server.sendall(b"end")
    with (folder() / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    for name in (SOCKET, LOCK, f"{SOCKET}.log"):
        (folder() / name).unlink(missing_ok=True)


def connected() -> socket.socket:
    """Wait until it has made its imports; RuntimeError where it has ended."""
    while True:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(str(folder() / SOCKET))
            return server
        except OSError:
            server.close()
        with (folder() / LOCK).open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise RuntimeError((folder() / f"{SOCKET}.log").read_text(errors="replace")[-3000:])
        time.sleep(0.05)


def run(
    module: str, *argv: str, cwd: Path, env: dict[str, str], timeout: float, training: bool
) -> subprocess.CompletedProcess:
    """`python -m MODULE ARGV...` there, or `python -c CODE` where the module is -c.

    training: what it trains is trained in a forked child as well.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, connected() as server:
        socket.send_fds(server, [b"+"], [out.fileno(), err.fileno()])
        asked = {"module": module, "argv": argv, "cwd": str(cwd), "env": env, "training": training}
        server.sendall(json.dumps(asked).encode())
        server.shutdown(socket.SHUT_WR)
        server.settimeout(timeout)
        answer = b""
        try:
            while part := server.recv(100):
                answer += part
        except TimeoutError:
            os.killpg(int(answer.split()[0]), signal.SIGKILL)
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess([module, *argv], int(answer.split()[1]), *texts)


def serve(session: int, lock: int) -> None:
    import forked  # noqa: F401 (axolotl, before forking)

    gc.freeze()  # garbage collections in a child then leave these pages alone

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder() / SOCKET))
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who attends
        while alive(session):
            if not select.select([listener], [], [], 1)[0]:
                continue
            client, _ = listener.accept()
            asked = socket.recv_fds(client, 1, 2)
            if asked[0] == b"e":
                return
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                os.close(lock)
                attend(client, asked[1])
            client.close()
            for descriptor in asked[1]:
                os.close(descriptor)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False


def attend(client: socket.socket, outputs: list[int]) -> NoReturn:
    """Fork the command, tell its process and then its exit code."""
    text = b""
    while part := client.recv(2**16):
        text += part
    asked = json.loads(text)
    pid = os.fork()
    if not pid:
        client.close()
        os.setsid()
        for stream, descriptor in enumerate(outputs, 1):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        code = 1
        try:
            command(**asked)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if not isinstance(stop.code, int | None):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()  # temporary files are cleared up; to take all modules down would cost seconds
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    client.sendall(b"%d " % pid)
    client.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def command(module: str, argv: list[str], cwd: str, env: dict[str, str], training: bool) -> None:
    """As `python -m` would, in this process."""
    os.environ.clear()
    # The loader's threads would be the first to work in parallel in a forked process, where torch has no pool.
    os.environ |= env | {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
    os.chdir(cwd)
    theirs = [place for place in sys.path if place not in (str(ROOT), str(ROOT / "tests"))]
    sys.path[:] = [cwd, *env["PYTHONPATH"].split(os.pathsep), *theirs]
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    if training:
        importlib.import_module("finlora.train.launch").axolotl = axolotl
    if module == "-c":
        exec(compile(argv[0], "<string>", "exec"), {"__name__": "__main__"})
        return
    loaded = importlib.import_module(module)
    assert loaded.__file__.startswith(cwd), f"{module} is not the copy's"
    sys.argv = [loaded.__file__, *argv]
    (importlib.import_module(f"{module}.cli") if hasattr(loaded, "__path__") else loaded).main()


def axolotl(command: str, config: Path, args: list[str], local: bool, lock) -> None:
    """finlora.train.launch.axolotl in a forked child."""
    from forked import axolotl_command

    launch, errors = (importlib.import_module(f"finlora.{name}") for name in ("train.launch", "core.errors"))
    code, output = axolotl_command(command, str(config), *args)
    with launch.log_file(config).open("a", encoding="utf-8") as log:
        log.write(output)
    if code:
        raise errors.UserError(launch.why(output, f"axolotl {command} {config}", code))
