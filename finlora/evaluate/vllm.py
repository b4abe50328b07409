"""vLLM on merged weights, in an environment of its own: it pins another torch than axolotl, and refuses DoRA adapters.

`make vllm` sets .venv-vllm up. The server is started on this machine for one evaluation and ended with it.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.evaluate.results import Run
from finlora.models.trained import TrainedModel

VLLM = ROOT / ".venv-vllm" / "bin" / "vllm"
START = 900  # seconds; loading 8B weights and capturing graphs takes about two minutes on an H200


def merged(trained: TrainedModel, run: Run, tokenizer) -> Path:
    """A folder with the run's weights in 16 bits and its tokenizer: made once, named by what is in it."""
    from finlora.models import load as models  # late: `make serve` needs neither torch nor transformers

    if not VLLM.is_file():
        raise UserError(f"{VLLM.relative_to(ROOT)}: is missing; `make vllm` sets vLLM up, in its own environment")
    folder = merged_place(run)
    if folder.is_dir():
        return folder
    model = models.load_base(trained.base_model, trained.bits)
    if run.adapter:
        model = models.attach(model, trained.adapter)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged-") as beside:
        whole = Path(beside) / "model"
        models.save(model, tokenizer, whole, trained.eot_tokens)
        whole.rename(folder)
    return folder


def merged_place(run: Run) -> Path:
    """Named by what is in it: base and adapter by their checksums, the prompt, the bits, and what ends an answer."""
    parts = (run.base_sha256 or "hub", run.adapter_sha256 or "base", run.template_sha256, f"{run.bits}bit")
    parts += (hashlib.sha256(json.dumps(run.ends).encode()).hexdigest(),)
    return ROOT / ".cache" / f"merged-{Path(run.model).name}-{'-'.join(part[:12] for part in parts)}"


def command(folder: Path, name: str, host: str, port: int) -> list[str]:
    return [str(VLLM), "serve", str(folder), "--host", host, "--port", str(port), "--served-model-name", name]


def environment() -> dict[str, str]:
    """This process's, without its Python's paths: vLLM has an environment of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def serving(trained: TrainedModel, run: Run, tokenizer) -> Iterator[str]:
    """The URL of a vLLM server on the merged weights, which it calls by the run's name. Its log is beside their folder.

    UserError where it does not start.
    """
    weights = merged(trained, run, tokenizer)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = weights.with_name(f"{weights.name}.log")
    with log.open("wb") as file:
        server = subprocess.Popen(
            command(weights, run.subject, "127.0.0.1", port),
            stdout=file,
            stderr=file,
            env=environment(),
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, url, log)
        yield f"{url}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM) if server.poll() is None else None
        server.wait()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if server.poll() is not None:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise UserError(
                f"vLLM ended with exit code {server.returncode} ({last[:200]}); see {log.relative_to(ROOT)}"
            )
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise UserError(f"vLLM did not answer within {START} s; see {log.relative_to(ROOT)}")
