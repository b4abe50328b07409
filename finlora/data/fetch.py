"""Fetch FinLoRA's files at the pinned commit into data/raw, each verified before it is renamed into place.

    finlora fetch [TASK ...]        without a task: every file of data/manifest.json

FINLORA_MIRROR=<directory, file:// or http(s):// URL> takes them from a copy that has FinLoRA's layout.

The client is requests with urllib3's Retry: axolotl installs both, they honour proxies and certificates, and Retry
carries the back-off and Retry-After. pooch does not resume, and huggingface_hub knows only its own hub.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Retry

from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.data.tasks import load_tasks, task

MANIFEST = ROOT / "data" / "manifest.json"
RAW = ROOT / "data" / "raw"
BLOCK = 1 << 18
BUSY = (408, 429, 500, 502, 503, 504)
HINTS = {
    401: "it wants a login: put one into ~/.netrc",
    403: "it refuses access: ask whoever runs it",
    404: "the file is not there: set FINLORA_MIRROR to a copy that has it",
    407: "the proxy wants a login: put it into HTTPS_PROXY",
}


class _Hopeless(UserError):
    """What every other file would meet as well: no connection, a full disk."""


class _NotThere(UserError):
    """The source has no such file."""


def fetch(
    tasks: Sequence[str] = (),
    raw: Path = RAW,
    manifest: Path = MANIFEST,
    mirror: str | None = None,
    jobs: int = 4,
    timeout: float = 30,
    retries: int = 5,
    backoff: float = 1,
) -> list[Path]:
    """Bring every file of `tasks` (of the whole manifest without one) to `raw` and return their paths.

    A file already there with the right checksum stays. Another one is replaced, once its own bytes are all here.
    `timeout` in seconds is for connecting and for each read; `retries` counts the failures in a row, and starts again
    when a cut transfer got on by a block; `backoff` is the factor of their exponentially growing waits in seconds.
    Prints a line for each file. Raises UserError, after trying the others, when any could not be had.
    """
    pinned = read_manifest(manifest)
    wanted = _paths(tasks, pinned, manifest)
    entries = [entry for entry in pinned["files"] if entry["path"] in wanted]
    where = _mirror(mirror) if mirror else None
    policy = Retry(
        total=retries,
        backoff_factor=backoff,
        backoff_jitter=backoff,
        backoff_max=60,
        retry_after_max=120,
        status_forcelist=BUSY,
        raise_on_status=False,
    )
    stop = Event()
    outcomes: list[tuple[dict[str, Any], str | UserError | None]] = []
    with _bar(entries) as bar:
        means = {"pinned": pinned, "where": where, "raw": raw, "policy": policy, "timeout": timeout, "bar": bar}
        work = partial(_attempt, stop=stop, **means)
        for entry, outcome in _in_threads(work, entries, jobs):
            outcomes.append((entry, outcome))
            if isinstance(outcome, str):
                tqdm.write(f"{_local(raw, entry)}: {outcome}")
    _complain(outcomes, bool(mirror))
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
        given = entry.get("path") if isinstance(entry, dict) else entry
        parts = Path(str(given)).parts
        if len(parts) < 3 or parts[0] != "data" or ".." in parts:
            raise UserError(f"{path}: files[{number}]: {given!r} is not a path under data/")
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(entry.get("lfs_sha256") or entry.get("git_blob_sha1"))):
            raise UserError(f"{path}: files[{number}]: {given} has no checksum; restore it from git")
    return manifest


def checksum(path: Path, entry: dict[str, Any]) -> str:
    """The file's SHA-256 for an entry of Git LFS, else its git blob SHA-1 (of "blob <bytes>\\0" and the content)."""
    if "lfs_sha256" in entry:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_right(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file has the manifest entry's size, where that is known, and checksum."""
    if entry.get("bytes", path.stat().st_size) != path.stat().st_size:
        return False
    return checksum(path, entry) == _pinned(entry)


def _pinned(entry: dict[str, Any]) -> str:
    return entry.get("lfs_sha256") or entry["git_blob_sha1"]


def _local(raw: Path, entry: dict[str, Any]) -> Path:
    return raw / entry["path"].removeprefix("data/")


def _paths(names: Sequence[str], pinned: dict[str, Any], manifest: Path) -> set[str]:
    listed = {entry["path"] for entry in pinned["files"]}
    if not names:
        return listed
    paths = set()
    for name in names:
        entry = task(name)
        if not entry["released"]:
            raise UserError(f"{name}: not released by FinLoRA; make data FILE=my.jsonl TASK={name} takes your own")
        paths |= {f"data/{file}" for file in (entry["train"], *(test["file"] for test in entry["tests"].values()))}
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


def _in_threads(
    work: Callable[[dict[str, Any]], str | None], entries: list[dict[str, Any]], jobs: int
) -> Iterator[tuple[dict[str, Any], str | UserError | None]]:
    """Each entry with what work(entry) returned or the UserError that it raised, as they end."""
    # Not an executor: it would let Ctrl-C wait for its threads, and so for a stalled server.
    todo: SimpleQueue = SimpleQueue()
    done: SimpleQueue = SimpleQueue()

    def worker() -> None:
        with suppress(Empty):
            while True:
                entry = todo.get_nowait()
                try:
                    done.put((entry, work(entry)))
                except Exception as error:
                    done.put((entry, error))

    for entry in entries:
        todo.put(entry)
    for _ in range(min(jobs, len(entries))):
        Thread(target=worker, daemon=True).start()
    for _ in entries:
        entry, outcome = done.get()
        if isinstance(outcome, Exception) and not isinstance(outcome, UserError):
            raise outcome
        yield entry, outcome


def _attempt(entry: dict[str, Any], stop: Event, **means: Any) -> str | None:
    if stop.is_set():
        return None
    try:
        return _bring(entry, **means)
    except _Hopeless:
        stop.set()
        raise


def _bring(
    entry: dict[str, Any],
    pinned: dict[str, Any],
    where: str | Path | None,
    raw: Path,
    policy: Retry,
    timeout: float,
    bar: tqdm,
) -> str:
    target = _local(raw, entry)
    part = target.with_name(target.name + ".part")
    advance = _advancing(bar, entry)
    try:
        if target.is_file() and is_right(target, entry):
            advance(target.stat().st_size)
            return "already there"
        outcome = "was not the pinned file: replaced" if target.exists() else "fetched"
        part.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            _fill(file, part, entry, sources(entry, pinned, where), policy, timeout, advance)
            os.fsync(file.fileno())
            os.replace(part, target)
        return f"{outcome}, {target.stat().st_size:,} bytes"
    except OSError as error:
        raise _Hopeless(f"{error.filename or part}: {_text(error)}; mend that and run again to go on") from error


def _fill(
    file: BinaryIO,
    part: Path,
    entry: dict[str, Any],
    places: list[str | Path],
    policy: Retry,
    timeout: float,
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
        whole = file.tell() == 0
        for place in places:
            try:
                if isinstance(place, Path):
                    _copy(place, file, advance)
                else:
                    whole &= _download(place, file, entry, policy, timeout, advance)
                break
            except _NotThere:
                if place == places[-1]:
                    raise
        file.flush()
        if is_right(part, entry):
            return
        # Bytes from an earlier run may be of another content: those are fetched again, once.
        found = _found(part, entry)
        _empty(file, advance)
        if whole:
            break
    raise UserError(f"{_shown(place)}: {found}; nothing of it was kept")


def _download(
    url: str, file: BinaryIO, entry: dict[str, Any], policy: Retry, timeout: float, advance: Callable[[int], None]
) -> bool:
    """Append what is missing, going on after each cut or stall; whether all came from one response."""
    left, furthest, whole = policy, file.tell(), True
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=policy))
        session.mount("https://", HTTPAdapter(max_retries=policy))
        while True:
            try:
                _respond(session, url, file, entry, timeout, advance)
                return whole
            except HTTPError as error:
                whole = False
                if file.tell() >= furthest + BLOCK:
                    left, furthest = policy, file.tell()
                try:
                    left = left.increment("GET", url, error=error)
                except MaxRetryError as end:
                    raise _network(end, url, timeout) from end
                left.sleep()
            except requests.RequestException as error:
                raise _network(error, url, timeout) from error


def _respond(
    session: requests.Session,
    url: str,
    file: BinaryIO,
    entry: dict[str, Any],
    timeout: float,
    advance: Callable[[int], None],
) -> None:
    start = file.seek(0, os.SEEK_END)
    # A compressed answer could neither be resumed nor compared with the checksum.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if start and status in (200, 206, 416):
            if not _goes_on(response, start, entry):
                _empty(file, advance)
                if status != 200:
                    raise ProtocolError(f"cannot go on from byte {start}")
        elif status != 200:
            kind = _NotThere if status in (404, 410) else UserError
            hint = HINTS.get(status, "run again later to go on" if status in BUSY else "check the address")
            raise kind(f"{_shown(url)}: HTTP {status} {response.reason}; {hint}")
        # read1 hands over every byte that came, so that a cut loses none.
        while block := response.raw.read1(BLOCK, decode_content=False):
            file.write(block)
            advance(len(block))
            if file.tell() > entry.get("bytes", file.tell()):
                return  # whatever this is, it may have no end
    # Only an answer that states its length tells a cut from an end.
    if file.tell() < entry.get("bytes", 0) and not response.headers.keys() & {"Content-Length", "Transfer-Encoding"}:
        raise ProtocolError(f"ended at byte {file.tell()} of {entry['bytes']}")


def _goes_on(response: requests.Response, start: int, entry: dict[str, Any]) -> bool:
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if response.status_code != 206 or not span or int(span[1]) != start:
        return False
    return span[3] == "*" or int(span[3]) == entry.get("bytes", int(span[3]))


def _copy(path: Path, file: BinaryIO, advance: Callable[[int], None]) -> None:
    if not path.is_file():
        raise _NotThere(f"{path}: no such file")
    for block in _blocks(path, file.seek(0, os.SEEK_END)):
        file.write(block)
        advance(len(block))


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as source:
            source.seek(start)
            while block := source.read(BLOCK):
                yield block
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_text(error)}); mend the mirror") from error


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{part}: another fetch is at work on it; run again when that has ended") from error
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


def _found(part: Path, entry: dict[str, Any]) -> str:
    with part.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
            return "is only a Git LFS pointer (run git lfs pull there)"
    size = part.stat().st_size
    if size != entry.get("bytes", size):
        return f"is not the pinned file ({size:,} bytes instead of {entry['bytes']:,})"
    kind = "SHA-256" if "lfs_sha256" in entry else "git blob SHA-1"
    return f"is not the pinned file ({kind} {checksum(part, entry)[:12]} instead of {_pinned(entry)[:12]})"


def _network(error: Exception, url: str, timeout: float) -> UserError:
    reason = error.args[0] if error.args and isinstance(error.args[0], HTTPError) else error
    reason = reason.reason if isinstance(reason, MaxRetryError) else reason
    host, text = urlsplit(url).hostname, _text(reason)
    if isinstance(reason, ProxyError):
        text = _text(reason.original_error)
        return _Hopeless(f"{host}: the proxy does not let us through ({text}); check HTTPS_PROXY and NO_PROXY")
    if isinstance(reason, SSLError):
        return _Hopeless(f"{host}: no trusted connection ({text}); set REQUESTS_CA_BUNDLE to your own certificates")
    if isinstance(reason, (NewConnectionError, ConnectTimeoutError)):
        return _Hopeless(f"{host}: no connection ({text}); check the network, or set FINLORA_MIRROR to a copy")
    if isinstance(reason, ReadTimeoutError):
        return UserError(f"{_shown(url)}: sent nothing for {timeout:g} s; run again to go on")
    if isinstance(reason, ProtocolError):
        return UserError(f"{_shown(url)}: the connection was cut ({text}); run again to go on")
    return UserError(f"{_shown(url)}: {type(reason).__name__}; check the address")


def _text(error: Exception) -> str:
    """The error's innermost reason in one line, without numbers and objects that say nothing to a user."""
    if isinstance(error, HTTPError) and error.args and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    noise = r"^HTTPS?Connection\S+ port=\d+\): |Failed to establish a new connection: |\[Errno -?\d+\] "
    return re.sub(noise, "", " ".join(text.split()))


def _shown(place: str | Path) -> str | Path:
    if isinstance(place, Path):
        return place
    # A mirror's address may carry a password or a token.
    parts = urlsplit(place)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _bar(entries: list[dict[str, Any]]) -> tqdm:
    total = sum(entry.get("bytes", 0) for entry in entries)
    return tqdm(total=total, unit="B", unit_scale=True, desc="data", disable=None)


def _advancing(bar: tqdm, entry: dict[str, Any]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        with bar.get_lock():
            if "bytes" not in entry and not bar.disable:
                bar.total += count
            bar.update(count)

    return advance


def _complain(outcomes: list[tuple[dict[str, Any], str | UserError | None]], mirror: bool) -> None:
    """Raise UserError for the files that could not be had; where there is more to say than one line, print it first."""
    errors = {entry["path"]: error for entry, error in outcomes if isinstance(error, UserError)}
    if not errors:
        return
    lacking = sorted(path for path, error in errors.items() if mirror and isinstance(error, _NotThere))
    # What stops one file stops all: it is said once.
    lines = list(dict.fromkeys(str(error) for path, error in errors.items() if path not in lacking))
    if lacking:
        lines.append(f"FINLORA_MIRROR lacks {len(lacking)} of {len(outcomes)} files: {', '.join(lacking)}")
    if len(lines) > 1:
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        lines = [f"{sum(not isinstance(end, str) for _, end in outcomes)} of {len(outcomes)} files were not fetched"]
    raise UserError(lines[0])


def run(
    tasks: Sequence[str], raw: Path, manifest: Path, jobs: int, timeout: float, retries: int, backoff: float
) -> None:
    """Fetch, and name the tasks that nobody publishes."""
    fetch(tasks, raw, manifest, os.environ.get("FINLORA_MIRROR"), jobs, timeout, retries, backoff)
    for name, entry in load_tasks().items():
        if not tasks and not entry["released"]:
            print(f"{name}: not released by FinLoRA; make data FILE=my.jsonl TASK={name} takes your own")
