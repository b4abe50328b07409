"""What every command does first: text is UTF-8, caches can be written, libraries' own messages are off."""

import locale
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

from finlora.core.paths import ROOT, shown


def start() -> None:
    """Prepare this process and those that it starts. Call it before torch and transformers are imported."""
    use_utf8()
    use_writable_caches()
    quiet()


def use_utf8() -> None:
    """Begin this process again in Python's UTF-8 mode where the locale's encoding is another.

    torch 2.13 reads its own sources in the locale's encoding, and fails at its import; rows hold more than ASCII.
    """
    if not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "finlora", *sys.argv[1:]])


def use_writable_caches() -> None:
    """Where nothing can be written below HOME, keep what libraries cache in this repository's .cache, and say so.

    A cache of models that is there stays in use: it is only read.
    """
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and no such user: as in a container that runs under another user's number
        home = Path("/")
    hub = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    caches = {"HF_DATASETS_CACHE": hub / "datasets", "TRITON_CACHE_DIR": home / ".triton"}
    if not (hub / "hub").is_dir():
        caches["HF_HUB_CACHE"] = hub / "hub"
    if not hub.is_dir():  # huggingface_hub 1.x looks for the token there, and fails below a file
        caches["HF_TOKEN_PATH"] = hub / "token"
    moved = [name for name, folder in caches.items() if name not in os.environ and not _is_writable(folder)]
    if moved:
        print(f"{home}: cannot be written; caches are in {shown(str(ROOT / '.cache'))}", file=sys.stderr)
    for name in moved:
        os.environ[name] = str(ROOT / ".cache" / name.lower())


def _is_writable(folder: Path) -> bool:
    try:
        # Not `existing`: where a file is in the folder's place or above it, nothing can be made there.
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=nearest):
            return True
    except OSError:
        return False


def is_verbose() -> bool:
    """Whether all that libraries print is shown: VERBOSE=1."""
    return os.environ.get("VERBOSE", "") not in ("", "0")


def quiet() -> None:
    """Turn off what libraries print while they are imported, unless VERBOSE=1 is set.

    torchao 0.17 warns of kernels for other GPUs, bitsandbytes 0.50 of hub kernels, torch 2.13 of a deprecated call of
    torchao's, DeepSpeed 0.18 of a machine without a GPU, and transformers 5 of models that are loaded as intended.
    """
    if is_verbose():
        return
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Not a level: DeepSpeed sets its own when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars, lm-eval's and the hub's, that would fill a pipe
    warnings.filterwarnings("ignore", module=r"(bitsandbytes|torch|torchao|typer|fla|kernels)\b")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
