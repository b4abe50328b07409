"""Download FinLoRA's files at the pinned commit into data/raw; each is verified before it is renamed into place.

FINLORA_MIRROR=<directory, file:// or http(s):// URL> takes them from a copy that has FinLoRA's layout.

requests is the client: it honours proxies, certificates and ~/.netrc, and urllib3's Retry waits and tries again. What
neither does is resume a body that was cut. pooch does not either, and huggingface_hub knows only its own hub.
"""

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import requests
from annotated_types import Predicate
from pydantic import model_validator
from requests.adapters import HTTPAdapter
from requests.exceptions import ProxyError, SSLError
from tqdm import tqdm
from urllib3.exceptions import ConnectTimeoutError, HTTPError, ProtocolError, ReadTimeoutError
from urllib3.util import Retry

from finlora.core.errors import UserError
from finlora.core.files import git_blob_sha1, sha256
from finlora.core.paths import RAW, ROOT
from finlora.core.tables import Record, expecting, read_entry, read_table
from finlora.data.tasks import load_tasks, task

MANIFEST = ROOT / "data" / "manifest.json"
BLOCK = 1 << 18
BUSY = (408, 429, 500, 502, 503, 504)
REMEDIES = {
    401: "it wants a login: put one into ~/.netrc",
    403: "it refuses access: ask whoever runs it",
    404: "the file is not there: set FINLORA_MIRROR to a copy that has it",
    407: "the proxy wants a login: put it into HTTPS_PROXY",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class _StopsAll(UserError):
    """What every other file would meet as well: no connection, a full disk."""


class _NotThere(UserError):
    """The source has no such file."""


def _under_data(path: str) -> bool:
    parts = Path(path).parts
    return len(parts) > 2 and parts[0] == "data" and ".." not in parts


class PinnedFile(Record):
    """A file of FinLoRA's repository. Where lfs_sha256 is given, git_blob_sha1 is that of the pointer."""

    path: Annotated[str, Predicate(_under_data), expecting("a path under data/")]
    git_blob_sha1: str | None = None
    lfs_sha256: str | None = None
    bytes: int | None = None
    rows: int | None = None

    @model_validator(mode="after")
    def _has_checksum(self) -> "PinnedFile":
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", self.checksum):
            raise ValueError(f"{self.path} has no checksum; restore it from git")
        return self

    @property
    def checksum(self) -> str:
        return self.lfs_sha256 or self.git_blob_sha1 or ""

    @property
    def local(self) -> str:
        """Its path under data/raw."""
        return self.path.removeprefix("data/")


class Manifest(Record):
    """The pinned commit of FinLoRA's repository, and its files."""

    repository: str
    commit: str
    note: str = ""
    files: list[PinnedFile]


class Patience(NamedTuple):
    """timeout: seconds for connecting and for each read; retries: failures in a row; backoff: the first wait, which
    doubles at each failure."""

    timeout: float = 30
    retries: int = 5
    backoff: float = 1


PATIENCE = Patience()


def fetch(
    tasks: Sequence[str] = (),
    raw: Path = RAW,
    manifest: Path = MANIFEST,
    mirror: str | None = None,
    patience: Patience = PATIENCE,
) -> list[Path]:
    """Bring every file of `tasks` (of the whole manifest without one) to `raw` and return their paths.

    A file already there with the right checksum stays. Another one is replaced, once its own bytes are all here.
    Prints a line for each file. Raises UserError, after trying the others, when any could not be had.
    """
    pinned = read_manifest(manifest)
    paths = _paths(tasks, pinned, manifest)
    files = [file for file in pinned.files if file.path in paths]
    where = _mirror(mirror) if mirror else None
    errors: dict[str, UserError] = {}
    done = 0
    sizes = [file.bytes for file in files]
    with (
        _session(patience) as session,
        tqdm(total=sum(sizes) if all(sizes) else None, unit="B", unit_scale=True, desc="data", disable=None) as bar,
    ):
        for file in files:
            try:
                target, candidates = raw / file.local, sources(file, pinned, where)
                tqdm.write(f"{target}: {_fetch_one(file, target, candidates, session, patience.timeout, bar)}")
                done += 1
            except UserError as error:
                errors[file.path] = error
                if isinstance(error, _StopsAll):
                    break
    if errors:
        _raise(errors, done, len(files), bool(mirror))
    return [raw / file.local for file in files]


def read_manifest(path: Path = MANIFEST) -> Manifest:
    """The manifest. Raises UserError that names the file and the entry."""
    return read_entry(path, None, read_table(path, "files"), Manifest)


def checksum(path: Path, file: PinnedFile) -> str:
    """The file's SHA-256 where it is in Git LFS, else its git blob SHA-1."""
    return sha256(path) if file.lfs_sha256 else git_blob_sha1(path)


def is_right(path: Path, file: PinnedFile) -> bool:
    """Whether a file has the pinned one's size, where that is known, and checksum."""
    return file.bytes in (None, path.stat().st_size) and checksum(path, file) == file.checksum


def _paths(names: Sequence[str], pinned: Manifest, manifest: Path) -> set[str]:
    listed = {file.path for file in pinned.files}
    if not names:
        return listed
    paths = set()
    for name in names:
        entry = task(name)
        if entry.own:
            continue  # `make task` has written its rows
        if not entry.released:
            raise UserError(f"{name}: not released by FinLoRA; make data FILE=my.jsonl TASK={name} takes your own")
        paths |= {f"data/{file}" for file in (entry.train, *(test.file for test in entry.tests.values()))}
    for path in sorted(paths - listed):
        raise UserError(f"{manifest}: has no entry for {path}; restore it from git")
    return paths


def _mirror(mirror: str) -> str | Path:
    try:
        parts = urlsplit(mirror)
    except ValueError as error:
        raise UserError(f"FINLORA_MIRROR: is not an address ({error}); give http://HOST/PATH") from error
    if parts.scheme in ("http", "https"):
        if not parts.hostname:
            raise UserError("FINLORA_MIRROR: names no host; give http://HOST/PATH")
        return mirror
    if parts.scheme not in ("", "file"):
        raise UserError(f"FINLORA_MIRROR: {parts.scheme}:// is not known; give a directory, file:// or http(s)://")
    folder = Path(unquote(parts.path) if parts.scheme else mirror).expanduser()
    if not folder.is_dir():
        raise UserError(f"FINLORA_MIRROR: {folder} is not a directory; give the one that holds train/ and test/")
    return folder / "data" if (folder / "data").is_dir() else folder


def sources(file: PinnedFile, pinned: Manifest, where: str | Path | None) -> list[str | Path]:
    """Where to look for a file, best first: URLs, or paths for a directory; `where` is the mirror, or None."""
    if where is None:
        host = "media.githubusercontent.com/media" if file.lfs_sha256 else "raw.githubusercontent.com"
        return [f"https://{host}/{pinned.repository}/{pinned.commit}/{quote(file.path)}"]
    if isinstance(where, Path):
        return [where / file.local]
    parts = urlsplit(where)
    folder = parts.path.rstrip("/")
    return [parts._replace(path=f"{folder}/{quote(tail)}").geturl() for tail in (file.path, file.local)]


def _session(patience: Patience) -> requests.Session:
    """A session that tries again where no answer came, or one that may be another later (Retry-After is heeded)."""
    session = requests.Session()
    retry = Retry(
        patience.retries,
        other=0,  # a certificate that is refused now is refused a second later
        status_forcelist=BUSY,
        backoff_factor=patience.backoff,
        backoff_max=60,
        retry_after_max=120,
        raise_on_status=False,
    )
    for scheme in "http://", "https://":
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    # A compressed answer could neither be resumed nor compared with the checksum.
    session.headers["Accept-Encoding"] = "identity"
    return session


class _Part(NamedTuple):
    """The .part file of a download, open at its end, and the bar that shows its bytes."""

    handle: BinaryIO
    size: int | None  # of the whole file, where it is known
    bar: tqdm

    def append(self, block: bytes) -> None:
        self.handle.write(block)
        self.bar.update(len(block))

    def empty(self) -> None:
        self.bar.update(-self.handle.seek(0, os.SEEK_END))
        self.handle.seek(0)
        self.handle.truncate()


def _fetch_one(
    file: PinnedFile, target: Path, candidates: list[str | Path], session: requests.Session, timeout: float, bar: tqdm
) -> str:
    """Bring one file into place; what happened, in words. Its .part file is kept where more may come later."""
    path = target.with_name(target.name + ".part")
    try:
        if target.is_file() and is_right(target, file):
            bar.update(target.stat().st_size)
            return "already there"
        outcome = "was not the pinned file: replaced" if target.exists() else "fetched"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as handle:
            part = _Part(handle, file.bytes, bar)
            kept = handle.seek(0, os.SEEK_END)
            bar.update(kept)
            if not kept or not is_right(path, file):
                if kept >= (file.bytes or kept + 1):
                    part.empty()
                resumed = _fill(part, candidates, session, timeout)
                # Bytes from before a cut or from an earlier run may be of another file: all are fetched again, once.
                if resumed and not is_right(path, file):
                    part.empty()
                    _fill(part, candidates, session, timeout)
                if fault := _fault(path, file):
                    part.empty()
                    raise UserError(f"{_shown(candidates[0])}: {fault}; nothing of it was kept")
            os.fsync(handle.fileno())
            os.replace(path, target)
        return f"{outcome}, {target.stat().st_size:,} bytes"
    except OSError as error:
        raise _StopsAll(f"{error.filename or path}: {_text(error)}; fix that and run again to resume") from error


def _fill(part: _Part, candidates: list[str | Path], session: requests.Session, timeout: float) -> bool:
    """Append what is missing, from the first candidate that exists; whether it is of more than one answer."""
    resumed = part.handle.tell() > 0
    for candidate in candidates:
        try:
            if isinstance(candidate, Path):
                _copy(candidate, part)
            else:
                resumed |= _download(candidate, part, session, timeout)
            break
        except _NotThere:
            if candidate == candidates[-1]:
                raise
    part.handle.flush()
    return resumed


def _download(url: str, part: _Part, session: requests.Session, timeout: float) -> bool:
    """Append what is missing, resuming where a body was cut; whether it was."""
    allowed = retry = session.get_adapter(url).max_retries
    furthest, cut = part.handle.tell(), False
    while True:
        try:
            _request(url, part, session, timeout)
            return cut
        except HTTPError as error:  # in the body, which the adapter's own Retry does not see
            cut = True
            if part.handle.tell() >= furthest + BLOCK:
                retry, furthest = allowed, part.handle.tell()
            try:
                retry = retry.increment("GET", url, error=error)
            except HTTPError:  # no attempt is left
                raise _network_error(error, url, timeout) from error
            retry.sleep()
        except requests.RequestException as error:
            raise _network_error(error, url, timeout) from error


def _request(url: str, part: _Part, session: requests.Session, timeout: float) -> None:
    """One GET of the bytes from the file's end on. An answer that does not continue there empties the file first."""
    start = part.handle.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={start}-"} if start else {}
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status, span = response.status_code, response.headers.get("Content-Range", "")
        if start and status in (200, 206, 416) and not (status == 206 and span.startswith(f"bytes {start}-")):
            part.empty()
            if status != 200:
                raise ProtocolError(f"cannot resume from byte {start}")
        elif status not in (200, 206):
            kind = _NotThere if status in (404, 410) else UserError
            remedy = REMEDIES.get(status, "run again later to resume" if status in BUSY else "check the address")
            raise kind(f"{_shown(url)}: HTTP {status} {response.reason}; {remedy}")
        # read1 hands over every byte that came, so that an interruption loses none.
        while block := response.raw.read1(BLOCK, decode_content=False):
            part.append(block)
            if part.size is not None and part.handle.tell() > part.size:
                return  # whatever this is, it may have no end
    # Only an answer that states its length tells an interruption from an end.
    if part.handle.tell() < (part.size or 0) and not response.headers.keys() & {"Content-Length", "Transfer-Encoding"}:
        raise ProtocolError(f"ended at byte {part.handle.tell()} of {part.size}")


def _copy(path: Path, part: _Part) -> None:
    if not path.is_file():
        raise _NotThere(f"{path}: no such file")
    part.empty()
    try:
        content = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_text(error)}); fix the mirror") from error
    with content:
        shutil.copyfileobj(content, part.handle, BLOCK)
    part.bar.update(part.handle.tell())


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{part}: another fetch is writing it; run again when that has ended") from error
        except OSError:
            pass  # some cluster file systems have no locks
        # Between open and lock the other fetch may have renamed this very file into place.
        if not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno())):
            raise UserError(f"{part}: another fetch has just ended; run again")
        try:
            yield file
        finally:
            if part.exists() and file.seek(0, os.SEEK_END) == 0:
                part.unlink()


def _fault(path: Path, file: PinnedFile) -> str | None:
    """What is wrong with a file that should be the pinned one; None where nothing is."""
    if is_right(path, file):
        return None
    with path.open("rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is only a Git LFS pointer (run git lfs pull there)"
    size = path.stat().st_size
    if file.bytes not in (None, size):
        return f"is not the pinned file ({size:,} bytes instead of {file.bytes:,})"
    kind = "SHA-256" if file.lfs_sha256 else "git blob SHA-1"
    return f"is not the pinned file ({kind} {checksum(path, file)[:12]} instead of {file.checksum[:12]})"


def _network_error(error: Exception, url: str, timeout: float) -> UserError:
    # requests wraps what Retry gave up on: ConnectionError(MaxRetryError(..., reason)).
    reason, text = getattr(error.args[0] if error.args else None, "reason", error), _text(error)
    host = urlsplit(url).hostname
    if isinstance(error, ProxyError):
        return _StopsAll(f"{host}: the proxy refuses the connection ({text}); check HTTPS_PROXY and NO_PROXY")
    if isinstance(error, SSLError):
        return _StopsAll(f"{host}: no trusted connection ({text}); set REQUESTS_CA_BUNDLE to your own certificates")
    if isinstance(reason, ReadTimeoutError):
        return UserError(f"{_shown(url)}: sent nothing for {timeout:g} s; run again to resume")
    if isinstance(reason, HTTPError) and not isinstance(reason, ConnectTimeoutError):
        return UserError(f"{_shown(url)}: the connection was cut ({text}); run again to resume")
    if isinstance(error, requests.ConnectionError):
        return _StopsAll(f"{host}: no connection ({text}); check the network, or set FINLORA_MIRROR to a copy")
    return UserError(f"{_shown(url)}: {type(error).__name__}; check the address")


def _text(error: Exception) -> str:
    """The reason in one line, without numbers and objects that say nothing to a user."""
    reason = getattr(error.args[0] if error.args else None, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason)
    noise = r"HTTPS?Connection\S+ port=\d+\): |Failed to establish a new connection: |\[Errno -?\d+\] "
    return re.sub(noise, "", " ".join(text.split()))


def _shown(place: str | Path) -> str | Path:
    if isinstance(place, Path):
        return place
    # A mirror's address may carry a password or a token.
    parts = urlsplit(place)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _raise(errors: dict[str, UserError], done: int, files: int, mirror: bool) -> None:
    """Raise UserError for the files that could not be had; where there is more to say than one line, print it first."""
    lacking = sorted(path for path, error in errors.items() if mirror and isinstance(error, _NotThere))
    lines = [str(error) for path, error in errors.items() if path not in lacking]
    if lacking:
        lines.append(f"FINLORA_MIRROR lacks {len(lacking)} of {files} files: {', '.join(lacking)}")
    if len(lines) > 1:
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        lines = [f"{files - done} of {files} files were not fetched"]
    raise UserError(lines[0])


def run(tasks: Sequence[str], raw: Path, manifest: Path, patience: Patience) -> None:
    """Fetch, and name the tasks that nobody publishes."""
    fetch(tasks, raw, manifest, os.environ.get("FINLORA_MIRROR"), patience)
    for name, entry in load_tasks().items():
        if not tasks and not entry.released:
            print(f"{name}: not released by FinLoRA; make data FILE=my.jsonl TASK={name} takes your own")
