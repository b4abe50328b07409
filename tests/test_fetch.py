"""Fetching against a real HTTP server on this machine that serves ranges, stalls, cuts, lies and refuses."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from failures import failed, refuses, says
from hypothesis import given
from hypothesis import strategies as st
from terminals import all_of

from finlora import cli
from finlora.core.errors import UserError
from finlora.data import fetch as fetching
from finlora.data.fetch import Patience, PinnedFile, checksum, fetch, is_right, read_manifest, sources
from finlora.data.tasks import load_tasks

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "finlora"
NAME = "data/train/a.jsonl"
QUICK = Patience(timeout=2, retries=3, backoff=0.01)
PROXIES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]


class Handler(BaseHTTPRequestHandler):
    """Serves server.files with ranges; each request first takes the next misdeed from server.script."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, act = self.server, self.server.script.pop(0) if self.server.script else {}
        server.log.append((self.path, self.headers.get("Range")))
        body = act.get("body", server.files.get(self.path.removeprefix(act.get("root", ""))))
        if body is None:
            act = {"status": 404}
        if act.get("mute"):
            server.released.wait(20)
        if act.get("drop"):
            return self.cut()
        if "status" in act:
            self.send_response(act["status"])
            for key, value in act.get("headers", {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(ranged[1]) if ranged and not act.get("no_range") else 0
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", act.get("span", f"bytes {start}-{len(body) - 1}/{len(body)}"))
        for key, value in act.get("headers", {}).items():
            self.send_header(key, value)
        if act.get("compress") and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        rest = body[start:]
        if act.get("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            rest = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces(rest, 50)) + b"0\r\n\r\n"
        elif not act.get("no_length"):
            self.send_header("Content-Length", str(len(rest)))
        else:
            self.close_connection = True
        self.end_headers()
        end = act.get("cut", act.get("stall"))
        for piece in pieces(rest[:end], server.piece):
            server.sent += len(piece)  # first: the client may be faster
            self.wfile.write(piece)
            time.sleep(server.pause)
        if "stall" in act:
            self.wfile.flush()
            server.released.wait(20)
        if end is not None:
            self.cut()

    def cut(self):
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 50

    def handle_error(self, *_):
        pass  # a client that was killed


@contextlib.contextmanager
def serving(files=(), handler=Handler, script=(), piece=1 << 16, pause=0):
    with Server(("127.0.0.1", 0), handler) as server:
        server.files, server.script, server.log = (
            {f"/{path}": body for path, body in dict(files).items()},
            [*script],
            [],
        )
        server.piece, server.pause, server.sent = piece, pause, 0
        server.released = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def pieces(body, size):
    return [body[at : at + size] for at in range(0, len(body), size)]


def entry_of(path, body, lfs=False, size=True):
    entry = {"path": path, "git_blob_sha1": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()}
    if lfs:
        entry |= {"git_blob_sha1": "0" * 40, "lfs_sha256": hashlib.sha256(body).hexdigest()}
    return entry | ({"bytes": len(body)} if size else {})


def pin(folder, *entries):
    path = Path(folder) / "manifest.json"
    path.write_text(json.dumps({"repository": "o/r", "commit": "c" * 40, "files": entries}))
    return path


def body_of(length, seed=0):
    return random.Random(seed).randbytes(length)


def partial_of(raw, path=NAME):
    target = Path(raw) / path.removeprefix("data/")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(target.name + ".part")


def command(*options, **environment):
    env = {key: value for key, value in os.environ.items() if key.upper() not in PROXIES and key != "FINLORA_MIRROR"}
    started = [sys.executable, "-m", "finlora", "fetch", *map(str, options)]
    return {"args": started, "cwd": ROOT, "env": env | {"PYTHONPATH": str(ROOT)} | environment}


def finished(options, **more):
    """The process that has ended; what it wrote to stderr is the error and nothing else."""
    done = subprocess.run(**options, **more, capture_output=True, text=True)
    assert done.stderr.count("\n") == (done.returncode > 0), done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def plain_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in [*PROXIES, *map(str.lower, PROXIES), "FINLORA_MIRROR"]:
            patch.delenv(name, raising=False)
        yield


# What is pinned


def test_the_manifest_is_finloras():
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    assert read_manifest().model_dump(exclude_unset=True) == json.loads((SHARED / "manifest.json").read_text())


def test_the_checksum_is_gits(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    pinned = PinnedFile(path=NAME, git_blob_sha1="ce013625030ba8dba906f756967f9e9ca394464a")
    assert checksum(tmp_path / "a", pinned) == pinned.git_blob_sha1
    in_lfs = pinned.model_copy(update={"lfs_sha256": "0" * 64})
    assert checksum(tmp_path / "a", in_lfs) == hashlib.sha256(b"hello\n").hexdigest()


def test_the_addresses_of_finlora():
    pinned = read_manifest()
    files = {file.path: sources(file, pinned, None) for file in pinned.files}
    at = f"Open-Finance-Lab/FinLoRA/{pinned.commit}/data"
    assert files["data/test/tfns_test.jsonl"] == [f"https://raw.githubusercontent.com/{at}/test/tfns_test.jsonl"]
    lfs = [f"https://media.githubusercontent.com/media/{at}/train/multi/general_multi.jsonl"]
    assert files["data/train/multi/general_multi.jsonl"] == lfs


def manifest_of(*files) -> bytes:
    return json.dumps({"repository": "r", "commit": "c", "files": files}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read|unreadable", "No such file", "git"]),
        (b"\xff", ["not UTF-8", "git"]),
        (b"[]", ["mapping", "git"]),
        (b'{"repository": "r", "commit": "c"}', ["'files'", "missing"]),
        (manifest_of({}), ["files: 0", "'path'", "missing"]),
        (manifest_of(5), ["files: 0", "mapping", "path"]),
        (manifest_of({"path": "data/../../x"}), ["files: 0: path", "'data/../../x'", "under data/"]),
        (manifest_of({"path": "/data/a/b"}), ["files: 0: path", "'/data/a/b'", "under data/"]),
        (manifest_of(entry_of(NAME, b""), {"path": "data/train/x"}), ["files: 1", "data/train/x", "checksum", "git"]),
    ],
)
def test_a_wrong_manifest_is_refused_with_one_line(tmp_path, content, words):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    with refuses(*words, file=path):
        fetch(raw=tmp_path / "raw", manifest=path)


# A mirror of the real files


@pytest.fixture(params=["directory", "directory above", "file URL", "HTTP", "HTTP above"])
def real_mirror(request, tmp_path):
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/finlora/data is not here")
    folder = SHARED if "above" in request.param else SHARED / "data"
    if "HTTP" not in request.param:
        yield folder.as_uri() if "URL" in request.param else str(folder)
        return

    class Quiet(SimpleHTTPRequestHandler):
        log_message = Handler.log_message

    with serving(handler=partial(Quiet, directory=str(folder))) as server:
        yield server.url


def test_the_real_files_come_from_a_mirror(real_mirror, tmp_path, capsys):
    here = {f"data/{path.relative_to(SHARED / 'data')}": path for path in (SHARED / "data").rglob("*.jsonl")}
    pinned = {file.path for file in read_manifest().files}
    lacking = sorted(pinned - set(here))
    with refuses(f"{len(lacking)} of {len(pinned)} files", ", ".join(lacking), key="FINLORA_MIRROR"):
        fetch(raw=tmp_path, mirror=real_mirror, patience=Patience(backoff=0))
    assert capsys.readouterr().out.count("fetched") == len(here) == len(pinned) - len(lacking) >= 8
    for path, original in here.items():
        assert (tmp_path / path.removeprefix("data/")).read_bytes() == original.read_bytes()
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(here)


def test_a_whole_task_comes_from_a_mirror_and_stays(tmp_path):
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/finlora/data is not here")
    options = command("formula", "financebench", "--raw", tmp_path, FINLORA_MIRROR=str(SHARED))
    first = finished(options)
    assert (first.returncode, first.stdout.count("fetched")) == (0, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    second = finished(options)
    assert (second.returncode, second.stdout.count("already there")) == (0, 4)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}


@pytest.mark.parametrize(
    ("mirror", "words"),
    [
        ("/no/such/place", ["/no/such/place", "directory", "train/"]),
        ("file:///no/such%20place", ["/no/such place", "directory", "train/"]),
        ("s3://bucket/x", ["s3://", "directory", "file://", "http(s)://"]),
        ("http://me:secret@/x", ["no host", "http://HOST/PATH"]),
        ("http://[x/", ["Invalid IPv6", "http://HOST/PATH"]),
    ],
)
def test_a_wrong_mirror_is_refused(tmp_path, mirror, words):
    with refuses(*words, file="FINLORA_MIRROR") as caught:
        fetch(raw=tmp_path, mirror=mirror)
    assert "secret" not in str(caught.value)


def test_a_directory_with_an_unpulled_lfs_file(tmp_path):
    entry = entry_of(NAME, body_of(5000), lfs=True)
    (tmp_path / "mirror" / "train").mkdir(parents=True)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry['lfs_sha256']}\nsize 5000\n"
    (tmp_path / "mirror" / "train" / "a.jsonl").write_text(pointer)
    with refuses("Git LFS pointer", "git lfs pull", file=tmp_path / "mirror" / "train" / "a.jsonl"):
        fetch(raw=tmp_path / "raw", manifest=pin(tmp_path, entry), mirror=str(tmp_path / "mirror"))
    assert not list((tmp_path / "raw").rglob("a.jsonl*"))


def test_a_directory_goes_on_from_a_part_and_replaces_a_foreign_one(tmp_path):
    body = body_of(5000)
    (tmp_path / "mirror" / "train").mkdir(parents=True)
    (tmp_path / "mirror" / "train" / "a.jsonl").write_bytes(body)
    for number, kept in enumerate([body[:1234], b"x" * 1234, b"x" * 5000, b"x" * 9000, body]):
        for size in (True, False):
            raw = tmp_path / f"raw{number}{size}"
            partial_of(raw).write_bytes(kept)
            fetch(raw=raw, manifest=pin(tmp_path, entry_of(NAME, body, size=size)), mirror=str(tmp_path / "mirror"))
            assert (raw / "train" / "a.jsonl").read_bytes() == body
            assert not partial_of(raw).exists()


# One file over HTTP: each misdeed of a server that ends well


BODY = body_of(3000)
MENDED = {
    "503 twice": ([{"status": 503}, {"status": 503}], [None, None, None]),
    "429": ([{"status": 429}], [None, None]),
    "dropped before the answer": ([{"drop": True}], [None, None]),
    "mute": ([{"mute": True}], [None, None]),
    "cut at once": ([{"cut": 0}], [None, None]),
    "cut": ([{"cut": 1000}], [None, "bytes=1000-"]),
    "cut one byte before the end": ([{"cut": 2999}], [None, "bytes=2999-"]),
    "cut three times": (
        [{"cut": 1000}, {"cut": 1}, {"cut": 500}],
        [None, "bytes=1000-", "bytes=1001-", "bytes=1501-"],
    ),
    "cut, then 503": ([{"cut": 1000}, {"status": 503}], [None, "bytes=1000-", "bytes=1000-"]),
    "stalled": ([{"stall": 1000}], [None, "bytes=1000-"]),
    "cut, then the range is ignored": ([{"cut": 1000}, {"no_range": True}], [None, "bytes=1000-"]),
    "cut, then another range": (
        [{"cut": 1000}, {"span": "bytes 999-2998/3000"}],
        [None, "bytes=1000-", None],
    ),
    "cut, then a file of another size": (
        [{"cut": 1000}, {"span": "bytes 1000-3999/4000"}],
        [None, "bytes=1000-"],
    ),
    "cut, then no Content-Range": ([{"cut": 1000}, {"span": ""}], [None, "bytes=1000-", None]),
    "cut, then 416": ([{"cut": 1000}, {"status": 416}], [None, "bytes=1000-", None]),
    "cut without a length": ([{"no_length": True, "cut": 1000}], [None, "bytes=1000-"]),
    "chunked": ([{"chunked": True}], [None]),
    "would compress": ([{"compress": True}], [None]),
    "cut while chunked": ([{"chunked": True, "cut": 1030}], [None, "bytes=918-"]),
    "redirected": ([{"status": 302, "headers": {"Location": "/data/train/a.jsonl"}}], [None, None]),
    "cut, then other bytes": ([{"cut": 1000}, {"body": bytes(3000)}], [None, "bytes=1000-", None]),
}


@pytest.mark.parametrize("lfs", [False, True], ids=["blob", "lfs"])
@pytest.mark.parametrize("name", MENDED)
def test_a_misdeed_that_ends_well(tmp_path, name, lfs, capsys):
    script, ranges = MENDED[name]
    with serving({NAME: BODY}, script=script) as server:
        manifest = pin(tmp_path, entry_of(NAME, BODY, lfs))
        fetch(raw=tmp_path / "raw", manifest=manifest, mirror=server.url, patience=QUICK._replace(timeout=0.3))
        assert [asked for _, asked in server.log] == ranges
        assert (tmp_path / "raw" / "train" / "a.jsonl").read_bytes() == BODY
        assert not partial_of(tmp_path / "raw").exists()
        says(capsys.readouterr().out, "fetched", "3,000 bytes", file=tmp_path / "raw" / "train" / "a.jsonl")
        fetch(raw=tmp_path / "raw", manifest=manifest, mirror=server.url)
        assert len(server.log) == len(ranges), "a file already there and right is not asked for"


@pytest.mark.parametrize("size", [True, False], ids=["size known", "size unknown"])
@pytest.mark.parametrize(
    "kept", [b"x", b"x" * 1000, b"x" * 3000, b"x" * 5000, BODY[:1000] + b"x", BODY + b"x", BODY[:2999], BODY, b""]
)
def test_a_part_of_an_earlier_run(tmp_path, kept, size):
    partial_of(tmp_path / "raw").write_bytes(kept)
    with serving({NAME: BODY}) as server:
        fetch(
            raw=tmp_path / "raw",
            manifest=pin(tmp_path, entry_of(NAME, BODY, size=size)),
            mirror=server.url,
            patience=QUICK,
        )
        assert (tmp_path / "raw" / "train" / "a.jsonl").read_bytes() == BODY
        assert len(server.log) <= 2
        if BODY.startswith(kept):
            assert server.sent == len(BODY) - len(kept), "only what is missing is sent"


def test_retry_after_is_heeded(tmp_path):
    with serving({NAME: BODY}, script=[{"status": 429, "headers": {"Retry-After": "1"}}]) as server:
        begin = time.monotonic()
        fetch(raw=tmp_path, manifest=pin(tmp_path, entry_of(NAME, BODY)), mirror=server.url, patience=QUICK)
        assert time.monotonic() - begin >= 1


@pytest.mark.parametrize("act", [{"status": 503}, {"cut": 0}], ids=["503", "cut"])
def test_the_waits_grow(tmp_path, act):
    with serving({NAME: BODY}, script=[act] * 4) as server:
        begin = time.monotonic()
        fetch(
            raw=tmp_path,
            manifest=pin(tmp_path, entry_of(NAME, BODY)),
            mirror=server.url,
            patience=Patience(retries=4, backoff=0.03),
        )
        assert 0 + 0.06 + 0.12 + 0.24 <= time.monotonic() - begin < 5


def test_a_transfer_that_gets_on_is_not_given_up(tmp_path):
    body = body_of(8 * fetching.BLOCK)
    with serving({NAME: body}, script=[{"cut": fetching.BLOCK + 1}] * 7) as server:
        fetch(
            raw=tmp_path,
            manifest=pin(tmp_path, entry_of(NAME, body)),
            mirror=server.url,
            patience=Patience(retries=1, backoff=0),
        )
        assert (tmp_path / "train" / "a.jsonl").read_bytes() == body
        assert len(server.log) == 8 and server.sent == len(body)


def test_a_changed_file_is_replaced_and_said(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_bytes(b"mine")
    with serving({NAME: BODY}) as server:
        fetch(raw=tmp_path, manifest=pin(tmp_path, entry_of(NAME, BODY)), mirror=server.url)
    assert (tmp_path / "train" / "a.jsonl").read_bytes() == BODY
    says(capsys.readouterr().out, "pinned", "replaced", "3,000 bytes", file=tmp_path / "train" / "a.jsonl")


def test_an_empty_file(tmp_path):
    with serving({NAME: b""}) as server:
        fetch(raw=tmp_path, manifest=pin(tmp_path, entry_of(NAME, b"")), mirror=server.url)
    assert (tmp_path / "train" / "a.jsonl").read_bytes() == b""


def test_a_name_that_needs_quoting(tmp_path):
    path = "data/train/a b#é.jsonl"
    with serving({"data/train/a%20b%23%C3%A9.jsonl": BODY}) as server:
        fetch(raw=tmp_path, manifest=pin(tmp_path, entry_of(path, BODY)), mirror=server.url)
    assert (tmp_path / "train" / "a b#é.jsonl").read_bytes() == BODY


def test_a_mirror_below_a_path_with_a_token(tmp_path):
    script = [{"root": "/some/where"}]
    with serving({f"{NAME}?token=x": BODY}, script=script) as server:
        fetch(raw=tmp_path, manifest=pin(tmp_path, entry_of(NAME, BODY)), mirror=f"{server.url}/some/where/?token=x")
        assert server.log == [(f"/some/where/{NAME}?token=x", None)]


# Misdeeds that end in one line


def refuse(tmp_path, script, body=BODY, files=None, **patience):
    """The server, with the error's text; nothing may be in place."""
    with serving({NAME: body} if files is None else files, script=script) as server:
        manifest = pin(tmp_path, entry_of(NAME, BODY))
        with pytest.raises(UserError) as caught:
            fetch(
                raw=tmp_path / "raw",
                manifest=manifest,
                mirror=server.url,
                patience=QUICK._replace(**{"timeout": 0.2} | patience),
            )
        server.text, server.kept = str(caught.value).replace(server.url, "URL"), partial_of(tmp_path / "raw")
    assert "\n" not in server.text
    assert not (tmp_path / "raw" / "train" / "a.jsonl").exists()
    return server


AT = "URL/data/train/a.jsonl"
SILENT, CUT = ["0.2 s", "again"], ["cut|interrupted|closed", "again"]
POINTER = b"version https://git-lfs.github.com/spec/v1\n" + bytes(4000)
PACKED = gzip.compress(BODY, mtime=0)
OTHER = ["not the pinned", "kept"]  # nothing of it was
OTHER_BYTES = [*OTHER, "SHA-1", *(entry_of("", body)["git_blob_sha1"][:12] for body in (bytes(3000), BODY))]
# What the server does, words of the error, how often it was asked, and what stays of the file for the next run.
GIVEN_UP = {
    "503": ([{"status": 503}] * 4, ["503 Service Unavailable", "again"], 4, None),
    "429": ([{"status": 429}] * 4, ["429 Too Many Requests", "again"], 4, None),
    "401": ([{"status": 401}], ["401 Unauthorized", "login", "~/.netrc"], 1, None),
    "403": ([{"status": 403}], ["403 Forbidden", "access", "ask"], 1, None),
    "407": ([{"status": 407}], ["407 Proxy", "login", "HTTPS_PROXY"], 1, None),
    "204": ([{"status": 204}], ["204 No Content", "address"], 1, None),
    "a loop": (
        *([{"status": 302, "headers": {"Location": "/data/train/a.jsonl"}}] * 40, ["TooManyRedirects", "address"]),
        *(31, None),
    ),
    "a wrong Retry-After": (
        *([{"status": 429, "headers": {"Retry-After": "soon"}}], ["InvalidHeader", "address"], 1, None),
    ),
    "silence": ([{"stall": 0}] * 4, SILENT, 2, None),
    "no answer at all": ([{"mute": True}] * 4, SILENT, 2, None),
    "a stall": ([{"stall": 1000}] + [{"stall": 0}] * 3, SILENT, 2, BODY[:1000]),
    "no answer": ([{"drop": True}] * 4, [*CUT, "without response"], 4, None),
    "a cut": ([{"cut": 1000}] + [{"cut": 0}] * 3, [*CUT, "0 bytes read", "2000 more"], 4, BODY[:1000]),
    "a cut at the same byte, ranges ignored": (
        *([{"cut": 1000, "no_range": True}] * 4, [*CUT, "1000 bytes read", "2000 more"], 4, BODY[:1000]),
    ),
    "too short": ([{"body": BODY[:1000]}], [*OTHER, "1,000 bytes", "3,000"], 1, None),
    "wrong bytes": ([{"body": bytes(3000)}], OTHER_BYTES, 1, None),
    "wrong bytes after a cut": ([{"cut": 1000}, *([{"body": bytes(3000)}] * 2)], OTHER_BYTES, 3, None),
    "an LFS pointer": ([{"body": POINTER}], ["Git LFS pointer", "git lfs pull", "kept"], 1, None),
    "a page that answers everything": (
        *([{"body": b"<html>" + bytes(4000)}], [*OTHER, "4,006 bytes", "3,000"], 1, None),
    ),
    "compressed unasked": (
        *([{"body": PACKED, "headers": {"Content-Encoding": "gzip"}}], [*OTHER, f"{len(PACKED):,} bytes", "3,000"]),
        *(1, None),
    ),
}


def test_an_answer_without_an_end_is_left(tmp_path):
    server = refuse(tmp_path, [{"body": bytes(50_000_000), "no_length": True}], timeout=5)
    assert server.sent < 25_000_000
    says(server.text, *OTHER, file=AT)
    assert not server.kept.exists()


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_misdeed_that_ends_in_one_line(tmp_path, name):
    script, words, requests, kept = GIVEN_UP[name]
    server = refuse(tmp_path, script, retries=1 if words is SILENT else 3)
    says(server.text, *words, file=AT)
    assert len(server.log) == requests
    assert (server.kept.read_bytes() if server.kept.exists() else None) == kept


def test_not_there_is_said_of_a_mirror_and_of_finlora(tmp_path, monkeypatch):
    says(refuse(tmp_path, [], files={}).text, "1 of 1 files", NAME, key="FINLORA_MIRROR")
    with serving() as server:
        # FinLoRA's own addresses need a network: the one of this server stands in for them.
        monkeypatch.setattr(fetching, "sources", lambda *_: [f"{server.url}/gone.jsonl"])
        with refuses("404 Not Found", "FINLORA_MIRROR", file=f"{server.url}/gone.jsonl"):
            fetch(raw=tmp_path / "raw", manifest=tmp_path / "manifest.json", patience=QUICK)


def test_the_others_come_although_some_fail(tmp_path, capsys):
    files = {f"data/train/{name}.jsonl": body_of(1000, number) for number, name in enumerate("abcdef")}
    manifest = pin(tmp_path, *(entry_of(path, body) for path, body in files.items()))
    del files["data/train/b.jsonl"], files["data/train/e.jsonl"]
    files["data/train/c.jsonl"] = bytes(1000)
    with serving(files) as server, refuses("3 of 6 files"):
        fetch(raw=tmp_path / "raw", manifest=manifest, mirror=server.url, patience=QUICK)
    lines = [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]
    says(lines[0], *OTHER, "SHA-1", file=f"{server.url}/data/train/c.jsonl")
    says(lines[1], "2 of 6 files", "data/train/b.jsonl, data/train/e.jsonl", key="FINLORA_MIRROR")
    assert len(lines) == 2
    there = sorted(path.name for path in (tmp_path / "raw" / "train").iterdir())
    assert there == ["a.jsonl", "d.jsonl", "f.jsonl"]


@pytest.fixture
def refusing():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it, and not listening
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_no_network_is_said_once(tmp_path, refusing):
    done = finished(command("--raw", tmp_path, "--backoff", 0, FINLORA_MIRROR=refusing))
    failed(done, "Connection refused", "network", "FINLORA_MIRROR", file="127.0.0.1")
    assert done.stdout == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_dead_proxy_is_said_once(tmp_path, refusing):
    # The real addresses, which a dead proxy keeps us from.
    done = finished(command("headline", "--raw", tmp_path, "--backoff", 0, HTTPS_PROXY=refusing, https_proxy=refusing))
    failed(done, "proxy", "HTTPS_PROXY", "NO_PROXY", file="raw.githubusercontent.com")


def test_a_proxy_is_used(tmp_path):
    with serving({}, script=[{"body": BODY}]) as proxy:
        options = command("--manifest", pin(tmp_path, entry_of(NAME, BODY)), "--raw", tmp_path, http_proxy=proxy.url)
        options["env"]["FINLORA_MIRROR"] = "http://mirror.invalid"
        assert subprocess.run(**options).returncode == 0
        assert proxy.log == [(f"http://mirror.invalid/{NAME}", None)]


def test_a_connection_that_cannot_be_trusted(tmp_path):
    with serving({NAME: BODY}) as server, refuses("trusted", "REQUESTS_CA_BUNDLE", "certificates", file="127.0.0.1"):
        secure = server.url.replace("http:", "https:")
        fetch(raw=tmp_path, manifest=pin(tmp_path, entry_of(NAME, BODY)), mirror=secure, patience=QUICK)


def test_passwords_and_tokens_are_not_shown(tmp_path):
    with serving({NAME: bytes(3000)}) as server, refuses(*OTHER, file=f"{server.url}/{NAME}") as caught:
        mirror = server.url.replace("//", "//user:secret@") + "/?token=secret"
        server.script.append({"body": bytes(3000)})
        fetch(raw=tmp_path, manifest=pin(tmp_path, entry_of(NAME, BODY)), mirror=mirror, patience=QUICK)
    assert "secret" not in str(caught.value)


def test_a_full_disk_keeps_nothing_in_place(tmp_path):
    # Writing to /dev/full is the real error; so is a limit on the size of a file.
    part = partial_of(tmp_path / "raw")
    part.symlink_to("/dev/full")
    with serving({NAME: BODY}) as server, refuses("No space left", "again", file=part):
        fetch(raw=tmp_path / "raw", manifest=pin(tmp_path, entry_of(NAME, BODY)), mirror=server.url, patience=QUICK)
    assert not (tmp_path / "raw" / "train" / "a.jsonl").exists()


def test_a_limit_on_the_size_of_a_file(tmp_path):
    body, other = body_of(1 << 20), "data/train/b.jsonl"
    manifest = pin(tmp_path, entry_of(NAME, body), entry_of(other, BODY))
    with serving({NAME: body, other: BODY}) as server:
        options = command("--manifest", manifest, "--raw", tmp_path / "raw", FINLORA_MIRROR=server.url)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
        part = partial_of(tmp_path / "raw")
        failed(finished(options, preexec_fn=limit), "File too large", "again", file=part)
        assert part.read_bytes() == body[:100_000]
        assert len(server.log) == 1, "the others are not tried"
        fetch(raw=tmp_path / "raw", manifest=manifest, mirror=server.url)
        assert (f"/{NAME}", "bytes=100000-") in server.log
    assert [path.name for path in sorted((tmp_path / "raw" / "train").iterdir())] == ["a.jsonl", "b.jsonl"]


def test_no_permission(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    raw.chmod(0o555)
    tmp_path.chmod(0o755)
    with serving({NAME: BODY}) as server:
        options = command("--manifest", pin(tmp_path, entry_of(NAME, BODY)), "--raw", "raw", FINLORA_MIRROR=server.url)
        # Root may write anywhere: it becomes nobody once all is read that nobody may not read.
        drop = """if True:
            import os, sys, finlora.data.fetch, finlora.cli
            os.chdir(sys.argv.pop(1))
            read = finlora.data.fetch.read_manifest
            def read_and_drop(path):
                content = read(path)
                if os.geteuid() == 0:
                    os.seteuid(65534)
                return content
            finlora.data.fetch.read_manifest = read_and_drop
            finlora.cli.main()
        """
        options["args"] = [sys.executable, "-c", drop, str(tmp_path), *options["args"][3:]]
        failed(finished(options), "Permission denied", "again", file="raw/train")


@pytest.mark.parametrize("place", ["raw", "raw/train", "raw/train/a.jsonl"])
def test_something_else_in_the_way(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if place.endswith("jsonl") else path.write_text("mine")
    with serving({NAME: BODY}) as server, refuses(f"{path}", "a directory|File exists", "again"):
        fetch(raw=tmp_path / "raw", manifest=pin(tmp_path, entry_of(NAME, BODY)), mirror=server.url, patience=QUICK)
    assert path.is_dir() if place.endswith("jsonl") else path.read_text() == "mine"


def test_two_fetches_of_one_file(tmp_path):
    manifest = pin(tmp_path, entry_of(NAME, BODY))
    means = {"raw": tmp_path / "raw", "manifest": manifest, "patience": Patience(timeout=10)}
    with serving({NAME: BODY}, script=[{"stall": 1000}]) as server:
        first = threading.Thread(target=partial(fetch, mirror=server.url, **means))
        first.start()
        until(lambda: server.sent == 1000)
        with refuses("another fetch", "again when", file=partial_of(tmp_path / "raw")):
            fetch(mirror=server.url, **means)
        server.released.set()
        first.join()
    assert (tmp_path / "raw" / "train" / "a.jsonl").read_bytes() == BODY


def test_a_part_that_is_renamed_between_open_and_lock(tmp_path, monkeypatch):
    part, lock = partial_of(tmp_path), fcntl.flock
    part.write_bytes(BODY)

    def late(file, how):
        os.replace(part, tmp_path / "train" / "a.jsonl")
        lock(file, how)

    monkeypatch.setattr(fetching.fcntl, "flock", late)
    with refuses("another fetch", "ended", "again", file=part), fetching._locked(part):
        pytest.fail("the file in place was opened for writing")
    assert (tmp_path / "train" / "a.jsonl").read_bytes() == BODY


# The command


def test_tasks_by_name(tmp_path):
    for names, stems in [
        (
            ["general_multi"],
            ["train/multi/general_multi", *("test/" + t for t in "fpb fiqa tfns nwgi headline ner".split())],
        ),
        (["xbrl_extract"], ["train/xbrl_extract_train", *(f"test/xbrl_extract_{k}" for k in KINDS)]),
        (["finer", "formula"], ["train/finer_train_batched", "test/finer_test_batched", "test/fnxl_test_batched"]),
    ]:
        with refuses(key="FINLORA_MIRROR") as caught:
            fetch(names, tmp_path / "raw", mirror=str(tmp_path))
        listed = str(caught.value).partition(": ")[2].split(", ")
        assert all(any(path.startswith(f"data/{stem}") for path in listed) for stem in stems), (names, listed)
        assert len(listed) == len(stems) + 2 * ("formula" in names)


KINDS = ["tags", "value", "formula_test", "formula_calculations"]


UNRELEASED = ["cfa", "not released", "make data", "FILE=", "TASK=cfa"]


def test_tasks_that_cannot_be_fetched(tmp_path):
    for names, words in (
        (["cfa"], UNRELEASED),
        (["formula", "cfa"], UNRELEASED),
        (["headlin"], ["headline", "tasks.yaml"]),
    ):
        with refuses(*words, key=names[-1]):
            fetch(names, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("--retries", "1.5"), ("--timeout", "nan"), ("--timeout", "-1")])
def test_a_wrong_number(capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fetch", option, value])
    assert ended.value.code == 2
    says(capsys.readouterr().err.strip(), "error: ", option, value, "--help")


def test_a_mistake_of_the_command(tmp_path):
    done = finished(command("cfa", "--raw", tmp_path))
    failed(done, *UNRELEASED)
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_every_file_of_a_released_task_is_pinned():
    pinned = {file.local for file in read_manifest().files}
    for entry in load_tasks().values():
        if entry.released:
            assert {entry.train, *(test.file for test in entry.tests.values())} <= pinned


def test_what_is_not_released_is_said_when_all_is_fetched(tmp_path):
    with serving({NAME: BODY}) as server:
        options = command(
            "--manifest", pin(tmp_path, entry_of(NAME, BODY)), "--raw", tmp_path / "raw", FINLORA_MIRROR=server.url
        )
        done = finished(options)
    assert done.returncode == 0
    says(done.stdout.splitlines()[-1], *UNRELEASED)


def test_progress_on_a_terminal(tmp_path):
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with serving({NAME: BODY}) as server:
        options = command(
            "--manifest", pin(tmp_path, entry_of(NAME, BODY)), "--raw", tmp_path / "raw", FINLORA_MIRROR=server.url
        )
        assert subprocess.run(**options, stderr=end, stdout=subprocess.DEVNULL).returncode == 0
    os.close(end)
    shown = all_of(terminal)
    assert "data:   0%" in shown and "data: 100%" in shown and "3.00k/3.00k" in shown


def test_it_starts_without_the_heavy_libraries():
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'numpy', 'axolotl', 'pyarrow'}"
    code = f"import sys, finlora.data.fetch; assert not {heavy} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=command()["env"], check=True)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_hand_it_ends_at_once_and_goes_on_later(tmp_path, sent, code):
    body = body_of(200_000)
    with serving({NAME: body}, script=[{"stall": 100_000}]) as server:
        options = command(
            "--manifest",
            pin(tmp_path, entry_of(NAME, body)),
            "--raw",
            tmp_path / "raw",
            "--timeout",
            60,
            FINLORA_MIRROR=server.url,
        )
        part = partial_of(tmp_path / "raw")
        running = subprocess.Popen(**options, stderr=subprocess.PIPE, text=True)
        until(lambda: part.exists() and part.stat().st_size > 50_000)
        running.send_signal(sent)
        errors = running.communicate(timeout=5)[1]
        assert running.returncode == code and "Traceback" not in errors
        kept = part.stat().st_size
        assert part.read_bytes() == body[:kept] and not (tmp_path / "raw" / "train" / "a.jsonl").exists()
        fetch(raw=tmp_path / "raw", manifest=tmp_path / "manifest.json", mirror=server.url)
        assert server.log[-1][1] == f"bytes={kept}-"
    assert (tmp_path / "raw" / "train" / "a.jsonl").read_bytes() == body


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# Interrupted at any byte


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def test_cut_at_every_byte(server, tmp_path):
    body = body_of(100)
    server.files = {f"/{NAME}": body}
    manifest = pin(tmp_path, entry_of(NAME, body))
    for at in range(len(body)):
        server.script, server.log, server.sent = [{"cut": at}], [], 0
        fetch(raw=tmp_path / str(at), manifest=manifest, mirror=server.url, patience=Patience(retries=1, backoff=0))
        assert (tmp_path / str(at) / "train" / "a.jsonl").read_bytes() == body
        assert server.log[1:] == [(f"/{NAME}", f"bytes={at}-" if at else None)] and server.sent == len(body)


MISDEEDS = st.one_of(
    st.fixed_dictionaries(
        {"cut": st.integers(0, 3000)}, optional={"no_range": st.booleans(), "chunked": st.booleans()}
    ),
    st.fixed_dictionaries({"cut": st.integers(0, 3000), "no_length": st.just(True)}),
    st.fixed_dictionaries({"cut": st.integers(0, 3000), "span": st.sampled_from(["", "bytes 0-1/2", "bytes 5-/x"])}),
    st.sampled_from([{"drop": True}, {"status": 503}, {"status": 416}, {"status": 429}]),
)


@given(
    body=st.binary(max_size=3000),
    lfs=st.booleans(),
    size=st.booleans(),
    kept=st.one_of(st.none(), st.binary(max_size=4000), st.integers(0, 3000)),
    script=st.lists(MISDEEDS, max_size=6),
    retries=st.integers(0, 2),
)
def test_interrupted_at_any_byte_it_ends_with_the_right_file(server, body, lfs, size, kept, script, retries):
    server.files, server.script = {f"/{NAME}": body}, [*script]
    with tempfile.TemporaryDirectory() as folder:
        raw, target = Path(folder) / "raw", Path(folder) / "raw" / "train" / "a.jsonl"
        manifest = pin(folder, entry_of(NAME, body, lfs, size))
        if kept is not None:
            partial_of(raw).write_bytes(body[:kept] if isinstance(kept, int) else kept)
        # Each failure has used up a misdeed; a foreign part may cost one run more.
        for _ in range(len(script) + 2):
            with contextlib.suppress(UserError):
                fetch(raw=raw, manifest=manifest, mirror=server.url, patience=Patience(5, retries, 0))
                break
            assert not target.exists()
        assert target.read_bytes() == body
        assert not partial_of(raw).exists()


# Killed at any moment


# Forks a fetch for each line that it reads and kills it at the next: imported once, so that every kill meets work.
NURSERY = """
import os, signal, sys, finlora.data.fetch, finlora.cli
for _ in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        finlora.cli.main()
        os._exit(0)
    sys.stdin.readline()
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("kills", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_any_moment_no_file_in_place_is_partial(tmp_path, kills):
    chance = random.Random(3)
    files = {
        f"data/{kind}/{number}.jsonl": body_of(200_000, number) for kind in ("train", "test") for number in range(3)
    }
    entries = {path: entry_of(path, body, lfs="0" in path, size="2" not in path) for path, body in files.items()}
    raw = tmp_path / "raw"
    targets = {raw / path.removeprefix("data/"): body for path, body in files.items()}
    killed = complete = midway = 0
    with serving(files, piece=10_000, pause=0.002) as server:
        manifest = pin(tmp_path, *entries.values())
        options = command("--manifest", manifest, "--raw", raw, FINLORA_MIRROR=server.url)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        nursery = options | {"args": [sys.executable, "-uc", NURSERY, *options["args"][3:]]}
        with subprocess.Popen(**nursery, **pipes) as running:
            while killed < kills:
                if all(target.exists() for target in targets):
                    complete += 1
                    for target in targets:
                        target.unlink()
                # Killed at once, when so many bytes are under way, or when all files are complete; none by the clock,
                # which says little on a busy machine.
                goal = server.sent + chance.choice((0, chance.randrange(700_000), 2_000_000))
                print("go", file=running.stdin, flush=True)
                until(lambda goal=goal: server.sent >= goal or all(target.exists() for target in targets))
                print("kill", file=running.stdin, flush=True)
                killed += int(running.stdout.readline()) == -signal.SIGKILL
                midway += any(raw.rglob("*.part"))
                for target, body in targets.items():
                    assert not target.exists() or target.read_bytes() == body, f"{target} is partial"
            running.stdin.close()
        assert midway > kills / 5 and complete > kills / 20, "the kills missed the transfers"
        assert subprocess.run(**options, capture_output=True).returncode == 0
    assert all(is_right(raw / path.removeprefix("data/"), PinnedFile(**entry)) for path, entry in entries.items())
    assert sorted(raw.rglob("*.*")) == sorted(targets)
