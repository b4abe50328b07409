"""Files that are never half-written, their checksums, and JSON that may not be there."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastdora.plugin.checksums import add_content
from fastdora.plugin.checksums import sha256 as sha256
from finlora.core.errors import UserError


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it into place when the block ends without an error.

    A reader sees the old file or the whole new one. Raises UserError where the folder cannot be written or is full.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder or free it") from error
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except OSError as error:
        if error.filename not in (None, beside, str(path)):
            raise  # another file's error, from inside the block
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space in its folder") from error
    finally:
        if os.path.exists(beside):
            os.unlink(beside)


def git_blob_sha1(path: Path) -> str:
    """SHA-1 of "blob <bytes>\\0" and the content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return add_content(digest, path).hexdigest()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content, without reading it; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def tensor_shapes(weights: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file; UserError where it is cut short or is none."""
    from safetensors import SafetensorError, safe_open  # 0.3 s, which most commands spare

    try:
        with safe_open(weights, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: cannot be read ({error}); fetch or train the adapter again") from error
