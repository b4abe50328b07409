"""What every command of this repository shares: one-line errors and files that are never half-written."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: the file, the line or key, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a command's main function; a UserError becomes `error: ...` on stderr and exit code 1, Ctrl-C 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    argparse.ArgumentParser.error = _refuse  # it would print every option of the command and leave the line last
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; the interpreter must not flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the options")


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
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space or mend the folder") from error
    finally:
        if os.path.exists(beside):
            os.unlink(beside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
