"""A user's mistakes in one line, and how a command ends."""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable

from fastdora.plugin.errors import first_line as first_line


class UserError(Exception):
    """A mistake that the user can fix. Its text is one line: the file, the line or key, and what to do."""


def did_you_mean(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean A, B? ` with the nearest of the known names, at most `count`; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), count, cutoff)
    return f"did you mean {', '.join(near)}? " if near else ""


def typed(option: str, variable: str = "") -> str:
    """How a user gives an option: as it is, and under make by its variable (`FILE=`) or, without one, within ARGS."""
    if not os.environ.get("MAKELEVEL"):
        return option
    return variable or f'ARGS="{option}"'


def run(main: Callable[[], None]) -> None:
    """Run a command's main function; a UserError becomes `error: ...` on stderr and exit code 1, Ctrl-C 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; the interpreter must not flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
