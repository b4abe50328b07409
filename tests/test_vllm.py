"""vLLM needs a GPU. Here a program in its place serves the merged folder, by transformers, under vLLM's command line.

Everything around it is real: merging, the folder, starting, waiting, asking, ending, and what is said when it fails.
"""

import json
import sys
import time
from dataclasses import replace

import pytest
from failures import refuses
from test_eval_models import adapters  # noqa: F401 (a fixture)
from test_eval_run import evaluate, read, tests_folder  # noqa: F401 (fixtures)

from finlora.evaluate import evaluation, vllm
from finlora.evaluate.results import Run

SERVER = """#!{python}
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
open({log!r}, "a").write(json.dumps([os.getpid(), sys.argv[1:]]) + "\\n")
assert sys.argv[1] == "serve" and "--served-model-name" in sys.argv
if {fail!r}:
    sys.exit("ValueError: No available memory for the cache blocks.")
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)[0, ids["input_ids"].shape[1]:]
        text = tokenizer.decode(out, skip_special_tokens=True)
        usage = {{"prompt_tokens": ids["input_ids"].shape[1], "completion_tokens": len(out)}}
        choice = {{"message": {{"content": text}}, "finish_reason": "length"}}
        said = json.dumps({{"choices": [choice], "usage": usage}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *_):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    def make(fail=False):
        path = tmp_path / ".venv-vllm" / "bin" / "vllm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SERVER.format(python=sys.executable, log=str(tmp_path / "starts"), fail=fail))
        path.chmod(0o755)
        return path

    monkeypatch.setattr(vllm, "ROOT", tmp_path)
    monkeypatch.setattr(vllm, "VLLM", tmp_path / ".venv-vllm" / "bin" / "vllm")
    return make


def test_the_server_gets_the_merged_model_and_its_prompt(evaluate, program, tmp_path):  # noqa: F811
    ours = read(evaluate("--limit", "3", "--name", "ours")[0])[1]
    program()
    folder = evaluate("--limit", "3", "--backend", "vllm", "--name", "served")[0]
    about, served = read(folder)
    kept = ("answer", "prompt_tokens", "answer_tokens", "stopped")
    assert [[row[key] for key in kept] for row in served] == [[row[key] for key in kept] for row in ours]
    assert json.loads((folder / "run.json").read_text())["backend"] == "vllm"
    pid, argv = json.loads((tmp_path / "starts").read_text())
    assert argv[argv.index("--served-model-name") + 1] == "served-raw"
    time.sleep(0.1)
    assert not alive(pid)

    program(fail=True)
    with refuses("vLLM"):
        evaluate("--limit", "6", "--backend", "vllm", "--name", "served")
    merged = [path for path in (tmp_path / ".cache").glob("merged-*") if path.is_dir()]
    assert len(merged) == 1, "merged once"


@pytest.mark.parametrize("key", ["base_sha256", "adapter_sha256", "template_sha256", "bits", "ends"])
def test_other_weights_or_another_prompt_are_merged_anew(key):
    """A base's weights may be replaced at the same path."""
    other = {"bits": 4, "ends": ["<|eot_id|>"]}.get(key, "d" * 64)
    run = Run(model="some/base", base_sha256="a" * 64, adapter_sha256="b" * 64, template_sha256="c" * 64, bits=8)
    assert vllm.merged_place(run) == vllm.merged_place(replace(run, subject="another"))
    assert vllm.merged_place(run) != vllm.merged_place(replace(run, **{key: other}))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


def test_what_keeps_it_from_serving_is_one_line(evaluate, program):  # noqa: F811
    with refuses("there|missing", "make vllm", file=".venv-vllm/bin/vllm"):
        evaluate("--limit", "1", "--backend", "vllm")
    program(fail=True)
    with refuses("vLLM", "exit code 1 ", "No available memory", "see .cache/merged-"):
        evaluate("--limit", "1", "--backend", "vllm")
    assert not list(evaluation.RESULTS.glob("*/fpb/set.json"))
