"""What every command does first: text is UTF-8, caches can be written, libraries' own messages are off."""

import locale
import logging
import os
import sys
import tempfile
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

from finlora.core.paths import ROOT, shown

NOISY = r"(bitsandbytes|torch|torchao|typer|fla|kernels)\b"  # modules whose warnings are not about what one does here
LOG = MemoryHandler(capacity=1)  # holds messages until `log_to` names a file, and then passes them on
ERRORS = logging.StreamHandler()
ERRORS.setLevel(logging.ERROR)


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
    """Keep what libraries say while they are imported for `log_to`, off the screen, unless VERBOSE=1 is set.

    torchao 0.17 warns of kernels for other GPUs, bitsandbytes 0.50 of hub kernels, torch 2.13 of a deprecated call of
    torchao's, DeepSpeed 0.18 of a machine without a GPU, and transformers 5 of models that are loaded as intended.
    """
    if is_verbose():
        return
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        _to_log(logging.getLogger(name))
    # Not another handler: DeepSpeed sets its own when it is imported.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars: lm-eval's beside ours, and all that would fill a pipe
    warnings.filterwarnings("ignore", module=NOISY)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def log_to(file: Path) -> None:
    """Name a log, and write to it what libraries say from here on and what they said while they were imported."""
    if is_verbose():
        return
    from transformers.utils import logging as transformers_logging  # late: it takes a second

    print(f"log       {shown(file)} (VERBOSE=1 shows it)", flush=True)
    LOG.setTarget(logging.FileHandler(file, mode="w", encoding="utf-8"))
    LOG.target.handleError = lambda record: None  # a full disk costs the log
    LOG.target.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    warnings.filterwarnings("default", module=NOISY)
    logging.captureWarnings(True)
    transformers_logging.disable_default_handler()
    transformers_logging.set_verbosity_warning()
    for name in ("py.warnings", "transformers"):
        _to_log(logging.getLogger(name))


def _to_log(logger: logging.Logger) -> None:
    """Send its messages to the log, and only errors to the screen."""
    logger.propagate = False
    for handler in (LOG, ERRORS):
        logger.addHandler(handler)


def _is_error(record: logging.LogRecord) -> bool:
    """Whether a message belongs on the screen; others go to the log."""
    if record.levelno < logging.ERROR:
        LOG.handle(record)
    return record.levelno >= logging.ERROR
