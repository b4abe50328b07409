"""Download FinLoRA's files at the pinned commit into data/raw; each is verified before it is renamed into place.

FINLORA_MIRROR=<directory, file:// or http(s):// URL> takes them from a copy that has FinLoRA's layout.

requests is the client: it honours proxies, certificates and ~/.netrc. pooch does not resume a download, and
huggingface_hub knows only its own hub.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

import requests
from requests.exceptions import ProxyError, SSLError
from tqdm import tqdm
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError
from urllib3.util import Retry

from finlora.core.errors import UserError
from finlora.core.files import add_content, sha256
from finlora.core.paths import RAW, ROOT
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


class _StopsAll(UserError):
    """What every other file would meet as well: no connection, a full disk."""


class _NotThere(UserError):
    """The source has no such file."""


class _Busy(Exception):
    """An answer that may be another one later. `wait`: the server's Retry-After in seconds, or None."""

    def __init__(self, error: UserError, wait: float | None):
        self.error, self.wait = error, wait


def fetch(
    tasks: Sequence[str] = (),
    raw: Path = RAW,
    manifest: Path = MANIFEST,
    mirror: str | None = None,
    timeout: float = 30,
    retries: int = 5,
    backoff: float = 1,
) -> list[Path]:
    """Bring every file of `tasks` (of the whole manifest without one) to `raw` and return their paths.

    A file already there with the right checksum stays. Another one is replaced, once its own bytes are all here.
    `timeout` in seconds is for connecting and for each read; `retries` counts failures in a row, and starts again when
    an interrupted transfer got on by a block; `backoff` is the first wait in seconds, doubled at each failure.
    Prints a line for each file. Raises UserError, after trying the others, when any could not be had.
    """
    pinned = read_manifest(manifest)
    paths = _paths(tasks, pinned, manifest)
    entries = [entry for entry in pinned["files"] if entry["path"] in paths]
    where = _mirror(mirror) if mirror else None
    errors: dict[str, UserError] = {}
    done = 0
    total = sum(entry.get("bytes", 0) for entry in entries)
    with tqdm(total=total, unit="B", unit_scale=True, desc="data", disable=None) as bar:
        for entry in entries:
            try:
                outcome = _fetch_one(entry, sources(entry, pinned, where), raw, (timeout, retries, backoff), bar)
            except UserError as error:
                errors[entry["path"]] = error
                if isinstance(error, _StopsAll):
                    break
            else:
                done += 1
                tqdm.write(f"{_local(raw, entry)}: {outcome}")
    if errors:
        _raise(errors, done, len(entries), bool(mirror))
    return [_local(raw, entry) for entry in entries]


def read_manifest(path: Path = MANIFEST) -> dict[str, Any]:
    """The manifest: repository, commit and files, each with path, git_blob_sha1 or lfs_sha256, and bytes where known.

    Raises UserError that names the file and the entry.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_text(error)}); restore it from git") from error
    if not isinstance(manifest, dict) or not all(manifest.get(key) for key in ("repository", "commit", "files")):
        raise UserError(f"{path}: repository, commit or files is missing; restore it from git")
    for number, entry in enumerate(manifest["files"]):
        name = entry.get("path") if isinstance(entry, dict) else entry
        parts = Path(str(name)).parts
        if len(parts) < 3 or parts[0] != "data" or ".." in parts:
            raise UserError(f"{path}: files[{number}]: {name!r} is not a path under data/")
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(_pinned(entry))):
            raise UserError(f"{path}: files[{number}]: {name} has no checksum; restore it from git")
    return manifest


def checksum(path: Path, entry: dict[str, Any]) -> str:
    """The file's SHA-256 for an entry of Git LFS, else its git blob SHA-1 (of "blob <bytes>\\0" and the content)."""
    if "lfs_sha256" in entry:
        return sha256(path)
    git_blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return add_content(git_blob, path).hexdigest()


def is_right(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file has the manifest entry's size, where that is known, and checksum."""
    if entry.get("bytes", path.stat().st_size) != path.stat().st_size:
        return False
    return checksum(path, entry) == _pinned(entry)


def _pinned(entry: dict[str, Any]) -> str | None:
    return entry.get("lfs_sha256") or entry.get("git_blob_sha1")


def _local(raw: Path, entry: dict[str, Any]) -> Path:
    return raw / entry["path"].removeprefix("data/")


def _paths(names: Sequence[str], pinned: dict[str, Any], manifest: Path) -> set[str]:
    listed = {entry["path"] for entry in pinned["files"]}
    if not names:
        return listed
    paths = set()
    for name in names:
        entry = task(name)
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
    return folder


def sources(entry: dict[str, Any], pinned: dict[str, Any], where: str | Path | None) -> list[str | Path]:
    """Where to look for a file, best first: URLs, or paths for a directory; `where` is the mirror, or None."""
    path, inside = entry["path"], entry["path"].removeprefix("data/")
    if where is None:
        host = "media.githubusercontent.com/media" if "lfs_sha256" in entry else "raw.githubusercontent.com"
        return [f"https://{host}/{pinned['repository']}/{pinned['commit']}/{quote(path)}"]
    if isinstance(where, Path):
        return [where / path, where / inside]
    parts = urlsplit(where)
    return [parts._replace(path=f"{parts.path.rstrip('/')}/{quote(tail)}").geturl() for tail in (path, inside)]


def _fetch_one(
    entry: dict[str, Any], places: list[str | Path], raw: Path, patience: tuple[float, int, float], bar: tqdm
) -> str:
    """Bring one file into place; what happened, in words. Its .part file is kept where more may come later."""
    target = _local(raw, entry)
    part = target.with_name(target.name + ".part")

    def advance(count: int) -> None:
        if "bytes" not in entry and not bar.disable:
            bar.total += count
        bar.update(count)

    try:
        if target.is_file() and is_right(target, entry):
            advance(target.stat().st_size)
            return "already there"
        outcome = "was not the pinned file: replaced" if target.exists() else "fetched"
        part.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            _complete(file, part, entry, places, patience, advance)
            os.fsync(file.fileno())
            os.replace(part, target)
        return f"{outcome}, {target.stat().st_size:,} bytes"
    except OSError as error:
        raise _StopsAll(f"{error.filename or part}: {_text(error)}; fix that and run again to resume") from error


def _complete(
    file: BinaryIO,
    part: Path,
    entry: dict[str, Any],
    places: list[str | Path],
    patience: tuple[float, int, float],
    advance: Callable[[int], None],
) -> None:
    """Complete the .part file until it is right; else leave none and raise UserError."""
    kept = file.seek(0, os.SEEK_END)
    advance(kept)
    if kept and is_right(part, entry):
        return
    if kept >= entry.get("bytes", kept + 1):
        _empty(file, advance)
    for _ in range(2):
        one_response = file.tell() == 0
        for place in places:
            try:
                if isinstance(place, Path):
                    _copy(place, file, advance)
                else:
                    one_response &= _download(place, file, entry, patience, advance)
                break
            except _NotThere:
                if place == places[-1]:
                    raise
        file.flush()
        if is_right(part, entry):
            return
        # Bytes from an earlier run may be of another file: those are fetched again, once.
        fault = _fault(part, entry)
        _empty(file, advance)
        if one_response:
            break
    raise UserError(f"{_shown(place)}: {fault}; nothing of it was kept")


def _download(
    url: str,
    file: BinaryIO,
    entry: dict[str, Any],
    patience: tuple[float, int, float],
    advance: Callable[[int], None],
) -> bool:
    """Append what is missing, resuming after each interruption; whether all came from one response."""
    timeout, retries, backoff = patience
    failures, furthest, one_response = 0, file.tell(), True
    with requests.Session() as session:
        while True:
            try:
                _request(session, url, file, entry, timeout, advance)
                return one_response
            except (HTTPError, requests.ConnectionError, requests.Timeout, _Busy) as error:
                one_response = False
                if file.tell() >= furthest + BLOCK:
                    failures, furthest = 0, file.tell()
                failures += 1
                # A proxy or a certificate that refuses now refuses a second later.
                if failures > retries or isinstance(error, ProxyError | SSLError):
                    raise _network_error(error, url, timeout) from error
                # As urllib3's Retry does: the first retry at once, then 2, 4, 8 ... times backoff, a minute at most.
                growing = min(60, backoff * 2 ** (failures - 1)) if failures > 1 else 0
                time.sleep(getattr(error, "wait", None) or growing)
            except requests.RequestException as error:
                raise UserError(f"{_shown(url)}: {type(error).__name__}; check the address") from error


def _request(
    session: requests.Session,
    url: str,
    file: BinaryIO,
    entry: dict[str, Any],
    timeout: float,
    advance: Callable[[int], None],
) -> None:
    """One GET of the bytes from the file's end on. An answer that does not continue there empties the file first."""
    start = file.seek(0, os.SEEK_END)
    # A compressed answer could neither be resumed nor compared with the checksum.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if start and status in (200, 206, 416):
            if not _continues(response, start, entry):
                _empty(file, advance)
                if status != 200:
                    raise ProtocolError(f"cannot resume from byte {start}")
        elif status != 200:
            raise _status_error(response, url)
        # read1 hands over every byte that came, so that an interruption loses none.
        while block := response.raw.read1(BLOCK, decode_content=False):
            file.write(block)
            advance(len(block))
            if file.tell() > entry.get("bytes", file.tell()):
                return  # whatever this is, it may have no end
    # Only an answer that states its length tells an interruption from an end.
    if file.tell() < entry.get("bytes", 0) and not response.headers.keys() & {"Content-Length", "Transfer-Encoding"}:
        raise ProtocolError(f"ended at byte {file.tell()} of {entry['bytes']}")


def _status_error(response: requests.Response, url: str) -> Exception:
    status = response.status_code
    kind = _NotThere if status in (404, 410) else UserError
    remedy = REMEDIES.get(status, "run again later to resume" if status in BUSY else "check the address")
    error = kind(f"{_shown(url)}: HTTP {status} {response.reason}; {remedy}")
    if status not in BUSY:
        return error
    try:
        after = Retry().get_retry_after(response.raw)  # seconds or a date
    except HTTPError as wrong:
        return UserError(f"{_shown(url)}: {type(wrong).__name__}; check the address")
    return _Busy(error, min(120, after) if after else None)


def _continues(response: requests.Response, start: int, entry: dict[str, Any]) -> bool:
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if response.status_code != 206 or not span or int(span[1]) != start:
        return False
    return span[3] == "*" or int(span[3]) == entry.get("bytes", int(span[3]))


def _copy(path: Path, file: BinaryIO, advance: Callable[[int], None]) -> None:
    if not path.is_file():
        raise _NotThere(f"{path}: no such file")
    try:
        source = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_text(error)}); fix the mirror") from error
    with source:
        source.seek(file.seek(0, os.SEEK_END))
        while block := source.read(BLOCK):
            file.write(block)
            advance(len(block))


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


def _empty(file: BinaryIO, advance: Callable[[int], None]) -> None:
    advance(-file.seek(0, os.SEEK_END))
    file.seek(0)
    file.truncate()


def _fault(part: Path, entry: dict[str, Any]) -> str:
    with part.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
            return "is only a Git LFS pointer (run git lfs pull there)"
    size = part.stat().st_size
    if size != entry.get("bytes", size):
        return f"is not the pinned file ({size:,} bytes instead of {entry['bytes']:,})"
    kind = "SHA-256" if "lfs_sha256" in entry else "git blob SHA-1"
    return f"is not the pinned file ({kind} {checksum(part, entry)[:12]} instead of {_pinned(entry)[:12]})"


def _network_error(error: Exception, url: str, timeout: float) -> UserError:
    host, text = urlsplit(url).hostname, _text(error)
    if isinstance(error, _Busy):
        return error.error
    if isinstance(error, ProxyError):
        return _StopsAll(f"{host}: the proxy refuses the connection ({text}); check HTTPS_PROXY and NO_PROXY")
    if isinstance(error, SSLError):
        return _StopsAll(f"{host}: no trusted connection ({text}); set REQUESTS_CA_BUNDLE to your own certificates")
    if isinstance(error, requests.ReadTimeout | ReadTimeoutError):
        return UserError(f"{_shown(url)}: sent nothing for {timeout:g} s; run again to resume")
    cut = isinstance(error, ProtocolError) or error.args and isinstance(error.args[0], ProtocolError)
    if cut or not isinstance(error, requests.ConnectionError):
        return UserError(f"{_shown(url)}: the connection was cut ({text}); run again to resume")
    return _StopsAll(f"{host}: no connection ({text}); check the network, or set FINLORA_MIRROR to a copy")


def _text(error: Exception) -> str:
    """The error's innermost reason in one line, without numbers and objects that say nothing to a user."""
    while not isinstance(error, OSError) or isinstance(error, requests.RequestException):
        inner = getattr(error, "original_error", None) or getattr(error, "reason", None)
        inner = inner or next((part for part in reversed(error.args) if isinstance(part, Exception)), None)
        if not isinstance(inner, Exception):
            break
        error = inner
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    noise = r"^HTTPS?Connection\S+ port=\d+\): |Failed to establish a new connection: |\[Errno -?\d+\] "
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


def run(tasks: Sequence[str], raw: Path, manifest: Path, timeout: float, retries: int, backoff: float) -> None:
    """Fetch, and name the tasks that nobody publishes."""
    fetch(tasks, raw, manifest, os.environ.get("FINLORA_MIRROR"), timeout, retries, backoff)
    for name, entry in load_tasks().items():
        if not tasks and not entry.released:
            print(f"{name}: not released by FinLoRA; make data FILE=my.jsonl TASK={name} takes your own")
