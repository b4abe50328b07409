"""Serve a merged model behind an OpenAI-compatible endpoint (`make serve`), to this machine alone unless HOST= is set.

finlora serve --recipe sentiment_r8_dora [--tiny] [--port 8000] [--host 0.0.0.0] [-- options of vLLM]

With a GPU this is vLLM, in its own environment; without one `transformers serve`, which answers one request at a time.
Prompts are made with the chat template saved beside the weights; answers are greedy unless a request says otherwise.
"""

import errno
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from finlora.core.errors import UserError
from finlora.core.machine import gpus
from finlora.core.paths import shown
from finlora.evaluate import vllm
from finlora.export.merged import need_merged
from finlora.models.trained import TrainedModel, disable_hub

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(trained: TrainedModel, host: str, port: int, backend: str | None, args: list[str]) -> None:
    """Serve until Ctrl-C; vLLM takes this process's place. Raises UserError before anything is loaded."""
    folder = need_merged(trained)
    backend = backend or ("vllm" if gpus() else "transformers")
    if backend == "vllm" and not vllm.VLLM.is_file():
        raise UserError(f"{shown(str(vllm.VLLM))}: is not there; run `make vllm`, or add BACKEND=transformers")
    if backend == "transformers" and args:
        raise UserError(f"ARGS={' '.join(args)}: are vLLM's; leave them out with BACKEND=transformers")
    check_port(host, port)
    if host not in LOCAL:
        key = "VLLM_API_KEY= asks for a key" if backend == "vllm" else f"BACKEND={backend} has no key"
        print(f"warning: anyone who reaches {host}:{port} can use the model; {key}", file=sys.stderr)
    print(f"serving   {trained.name} ({backend}) on http://{host}:{port}/v1; Ctrl-C ends it", flush=True)
    if backend == "vllm":
        on_vllm(folder, trained.name, host, port, args)
    else:
        on_transformers(folder, trained.name, host, port)


def check_port(host: str, port: int) -> None:
    """UserError where the port cannot be bound: in use, reserved, or on a host that is not this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            # As servers do: connections that linger after a server has ended do not block its port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a host name with an empty label, like a..b
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"PORT={port}: is in use on {host}; stop that server, or choose another port with PORT="
            ) from error
        raise UserError(
            f"HOST={host} PORT={port}: cannot be bound ({getattr(error, 'strerror', error)}); choose others"
        ) from error


def on_vllm(folder: Path, name: str, host: str, port: int, args: list[str]) -> None:
    """Replace this process by `vllm serve`."""
    greedy = ["--override-generation-config", '{"temperature": 0}']
    sys.stdout.flush()  # exec drops what is buffered
    os.execve(vllm.VLLM, [*vllm.command(folder, name, host, port), *greedy, *args], vllm.environment())


def on_transformers(folder: Path, name: str, host: str, port: int) -> None:
    """`transformers serve` in this process, until Ctrl-C.

    The command alone does not suffice (transformers 5.16): it names a local model by its path, lists the models of the
    hub's cache instead of the one it serves, and fails where there is no cache.
    """
    import torch
    from safetensors import SafetensorError

    disable_hub()
    from transformers.cli.serve import Serve

    about = {"id": name, "object": "model", "created": int(folder.stat().st_mtime), "owned_by": "local"}

    class ServeOne(Serve):
        def start_server(self) -> None:
            self._model_manager.get_gen_models = lambda: [about]
            super().start_server()

    dtype, working_directory = "auto" if torch.cuda.is_available() else "float32", Path.cwd()
    with tempfile.TemporaryDirectory() as folder_of_name:
        # Requests name the model by the path that the server was given: here its name is such a path.
        (Path(folder_of_name) / name).symlink_to(folder.resolve())
        os.chdir(folder_of_name)
        server = None
        try:
            # In a thread: in the main thread uvicorn raises Ctrl-C again inside its event loop and prints tracebacks.
            server = ServeOne(name, host=host, port=port, dtype=dtype, log_level="error", non_blocking=True)
            while server._thread.is_alive():  # an interrupted .join() takes the thread for ended
                time.sleep(0.1)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{shown(str(folder))}: cannot be served ({reason}); merge again with FORCE=1") from error
        finally:
            if server:
                server.kill_server()
            os.chdir(working_directory)
