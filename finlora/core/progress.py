"""What a command shows while it works: one bar on a terminal, a few lines elsewhere."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10  # a log of CI stays short, and a reader knows that something happens


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Gives a function that shows (done, total, a note) on stderr.

    On a terminal it is a bar. Elsewhere it is a line for a tenth of the work, at most one in SECONDS_BETWEEN_LINES.
    """
    bar, first, last, tenth, began, shown = None, None, None, 0, 0.0, time.monotonic()

    def show(done: int, total: int, note: str = "") -> None:
        nonlocal bar, first, last, tenth, began, shown
        if first is None:
            first, began = done, time.monotonic()  # before it the model was loaded
        if sys.stderr.isatty():
            # Lines: tqdm shows nothing on a terminal that says it has none, as those of containers do.
            options = {"ncols": shutil.get_terminal_size().columns, "nrows": 24, "disable": False}
            bar = bar or tqdm(total=total, initial=first, desc=what, unit=unit, file=sys.stderr, **options)
            if (done, note) != last:
                bar.n, last = done, (done, note)
                bar.set_postfix_str(note)
            return
        now = time.monotonic()
        if done * 10 // total > tenth and now - shown >= SECONDS_BETWEEN_LINES and done > first:
            tenth, shown = done * 10 // total, now
            left = (now - began) / (done - first) * (total - done)
            print(
                f"{what}: {done} of {total} {unit}s{note and f', {note}'}, {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    try:
        yield show
    finally:
        if bar:
            bar.close()


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
