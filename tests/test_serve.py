"""`make serve` and `make chat` on a merged model: real requests over HTTP, a real terminal, and the saved template."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
from failures import refuses, says
from runs import RECIPES
from transformers import AutoModelForCausalLM, AutoTokenizer

from finlora.core.errors import run
from finlora.evaluate import vllm
from finlora.export import chat, merge, serve
from finlora.models import trained as trained_models

pytestmark = pytest.mark.xdist_group("after")
MOST = 8


kept = []  # the merged model, made by the first test that needs it


@pytest.fixture
def merged(runs, tmp_path_factory):
    """The 16-bit run, merged."""
    trained = trained_models.load_trained(RECIPES[16])
    if kept:
        shutil.copytree(kept[0], trained.merged)
    else:
        merge.run(trained, limit=0)
        kept.append(shutil.copytree(trained.merged, tmp_path_factory.mktemp("merged") / "merged"))
    return trained


def answer(folder, turns):
    """Greedy, with the template beside the weights, and the prompt's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True), inputs["input_ids"].shape[1]


def child(function, fork=os.fork):
    """Run it in a forked process as a command of its own; (pid, what fork gave besides)."""
    made = fork()
    pid, *rest = made if isinstance(made, tuple) else (made,)
    if pid:
        return pid, *rest
    code = 1
    # The loader's threads would be the first to work in parallel in a forked process, where torch has no pool.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(function)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    finally:
        os._exit(code)


def ended(pid, seconds=20):
    """The exit code of a child that ends by itself within the seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it did not end")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_endpoint_answers_as_the_model_does(merged, tmp_path, monkeypatch):
    """On a machine whose hub cache does not exist yet."""
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", tmp_path / "no" / "hub")
    port = free_port()
    (pid,) = child(lambda: serve.serve(merged, "127.0.0.1", port, "transformers", []))
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            assert not os.waitpid(pid, os.WNOHANG)[0], "the server ended"
            time.sleep(0.05)
        listed = requests.get(f"{url}/v1/models", timeout=60)
        assert listed.ok and [model["id"] for model in listed.json()["data"]] == [merged.name]
        text = (Path(__file__).parent.parent / "docs" / "use.md").read_text(encoding="utf-8")
        documented = json.loads(re.search(r"/v1/chat/completions .*? -d '(\{.*?\n\})'", text, re.S)[1])
        assert documented["model"] == "sentiment_r8_dora"
        body = documented | {"model": listed.json()["data"][0]["id"], "max_tokens": MOST}
        turns = body["messages"]
        served = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        expected, length = answer(merged.merged, turns)
        assert served["choices"][0]["message"] == {"role": "assistant", "content": expected} and expected
        assert served["usage"]["prompt_tokens"] == length
        assert requests.post(f"{url}/v1/chat/completions", json=body | {"model": "gpt"}, timeout=60).status_code == 400
        with refuses("in use", "127.0.0.1", "another", file=f"PORT={port}"):
            serve.serve(merged, "127.0.0.1", port, "transformers", [])
    finally:
        os.kill(pid, signal.SIGINT)
        code = ended(pid)
    assert code == 130


def test_vllm_is_started_on_the_merged_folder(merged, tmp_path, monkeypatch):
    """A program in its place: vLLM needs a GPU. finlora/evaluate/vllm.py's tests serve through one."""
    program, log = tmp_path / "vllm", tmp_path / "argv.json"
    source = f"import json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open({str(log)!r}, 'w'))\n"
    program.write_text(f"#!{sys.executable} -S\n{source}")
    program.chmod(0o755)
    monkeypatch.setattr(vllm, "VLLM", program)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    port = free_port()
    (pid,) = child(lambda: serve.serve(merged, "127.0.0.1", port, "vllm", ["--max-model-len", "8192"]))
    assert ended(pid) == 0
    argv, environment = json.loads(log.read_text())
    assert argv[:2] == ["serve", str(merged.merged)] and argv[-2:] == ["--max-model-len", "8192"]
    options = dict(zip(argv[2:-2:2], argv[3:-2:2], strict=True))
    assert options == {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": merged.name,
        "--override-generation-config": '{"temperature": 0}',
    }
    assert environment["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in environment


@pytest.mark.parametrize(
    ("backend", "words"), [("transformers", ["BACKEND=transformers", "no key"]), ("vllm", ["VLLM_API_KEY=", "a key"])]
)
def test_other_machines_are_warned_of_and_only_vllm_has_a_key(backend, words, merged, monkeypatch, capsys):
    monkeypatch.setattr(vllm, "VLLM", Path(sys.executable))
    monkeypatch.setattr(serve, f"on_{backend}", lambda *_: None)
    port = free_port()
    serve.serve(merged, "0.0.0.0", port, backend, [])
    says(capsys.readouterr().err, f"0.0.0.0:{port}", *words, file="warning")


def test_what_cannot_be_served_is_one_line(runs, merged, tmp_path, monkeypatch):
    def fails(*words, file=None, what=merged, host="127.0.0.1", port=8000, backend=None, args=()):
        with refuses(*words, file=file):
            serve.serve(what, host, port, backend, list(args))

    absent = trained_models.load_trained(RECIPES[8])
    missing = "is not there|not found"
    fails(missing, "`make merge RECIPE=sentiment_r8_dora`", file="outputs/sentiment_r8_dora/merged", what=absent)
    monkeypatch.setattr(serve, "gpus", lambda: [("NVIDIA H100", 80.0, 79.0)])
    monkeypatch.setattr(vllm, "VLLM", tmp_path / ".venv-vllm" / "bin" / "vllm")
    fails("vllm", missing, "`make vllm`", "BACKEND=transformers")
    fails("vLLM", file="ARGS=--max-model-len 10", backend="transformers", args=("--max-model-len", "10"))
    for host in "192.0.2.1", "no.such.host", "no..host":
        fails("bound|bind", file=f"HOST={host} PORT=8000", host=host, backend="transformers")
    weights = merged.merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    here = os.getcwd()
    fails(
        "served|serve",
        "merge again",
        "FORCE=1",
        file="outputs/sentiment_bf16_r8_dora/merged",
        port=free_port(),
        backend="transformers",
    )
    assert os.getcwd() == here


def test_chat_answers_lines_of_a_pipe_as_the_model_does(merged, monkeypatch, capsys):
    model, tokenizer, what = chat.load(merged, "saved", keep_quantised=False)
    assert what == "outputs/sentiment_bf16_r8_dora/merged"
    monkeypatch.setattr(sys, "stdin", io.StringIO("sales rose\n\nand now?\n/new\nsales rose\n"))
    chat.chat(model, tokenizer, MOST)
    first = answer(merged.merged, [{"role": "user", "content": "sales rose"}])[0]
    turns = [("user", "sales rose"), ("assistant", first), ("user", "and now?")]
    second = answer(merged.merged, [{"role": role, "content": text} for role, text in turns])[0]
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n\n"


def test_chat_ends_an_answer_where_the_recipe_says(merged, monkeypatch, capsys):
    """A token that the model writes, an end by `eot_tokens`, is neither printed nor followed by another."""
    model, tokenizer, _ = chat.load(merged, "saved", keep_quantised=False)
    whole = answer(merged.merged, [{"role": "user", "content": "sales rose"}])[0]
    written = tokenizer(whole, add_special_tokens=False)["input_ids"]
    end = next(place for place in range(1, len(written)) if written[place] not in written[:place])
    monkeypatch.setattr(sys, "stdin", io.StringIO("sales rose\n"))
    chat.chat(model, tokenizer, MOST, [tokenizer.convert_ids_to_tokens(written[end])])
    assert capsys.readouterr().out == f"{tokenizer.decode(written[:end])}\n\n"


def test_ctrl_c_ends_an_answer_and_forgets_the_question(merged, monkeypatch, capsys):
    model, tokenizer, _ = chat.load(merged, "saved", keep_quantised=False)
    generate, asked = model.generate, []

    def interrupted(**arguments):
        asked.append(arguments["input_ids"].shape[1])
        if len(asked) == 1:
            raise KeyboardInterrupt
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"sales rose\nsales fell\n{'sales ' * 20000}\n"))
    chat.chat(model, tokenizer, MOST)
    expected, length = answer(merged.merged, [{"role": "user", "content": "sales fell"}])
    printed = capsys.readouterr()
    assert printed.out == f"\n{expected}\n\n" and asked[1] == length
    (line,) = [line for line in printed.err.splitlines() if "/new" in line]
    says(line, "more than")


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_is_talked_to_before_it_is_merged(runs, bits):
    """Merged in memory, or on quantised weights with cached norms: the same first token, its magnitudes included."""
    plan = trained_models.load_trained(RECIPES[bits])
    ids = torch.arange(3, 24)[None]
    logits = []
    for keep in (False, True):
        model, _, what = chat.load(plan, "saved", keep)
        says(what, f"outputs/{RECIPES[bits]}", "not merged" if keep else "merged in memory", f"{bits}-bit")
        with torch.inference_mode():
            logits.append(model(ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()


def read_until(terminal, pattern, seconds=30):
    text, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, text):
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.05)[0]:
            text += os.read(terminal, 4096).decode()
    return text


@pytest.mark.parametrize("key", [b"\x04", b"\x03"])
def test_ctrl_d_and_ctrl_c_leave_the_terminal_cleanly(merged, key):
    model, tokenizer, _ = chat.load(merged, "saved", keep_quantised=False)
    pid, terminal = child(lambda: chat.chat(model, tokenizer, MOST), pty.fork)
    try:
        read_until(terminal, "> $")
        os.write(terminal, b"sales rose\n")
        expected = answer(merged.merged, [{"role": "user", "content": "sales rose"}])[0]
        text = read_until(terminal, r"\n> $").replace("\r\n", "\n")
        assert expected in text
        os.write(terminal, key)
        assert ended(pid) == 0
    finally:
        os.close(terminal)
