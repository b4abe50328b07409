"""What a program has written to a pseudo-terminal whose other end is closed."""

import contextlib
import os


def all_of(terminal: int) -> str:
    """All that was written; closes the terminal. A read may return a part of it: a kernel thread passes it on."""
    text = b""
    with contextlib.suppress(OSError):  # once everything is read
        while chunk := os.read(terminal, 4096):
            text += chunk
    os.close(terminal)
    return text.decode()
