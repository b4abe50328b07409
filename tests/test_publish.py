"""`make publish`: the card says what is known and no more, and only what is listed goes, to a Hub that may refuse."""

import base64
import json
import re
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from failures import refuses
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import answered, label_rows, subject
from runs import RECIPES
from safetensors.torch import load_file, save_file

from finlora.core.errors import UserError
from finlora.evaluate import results
from finlora.export import merge, publish
from finlora.models import trained as trained_models

pytestmark = pytest.mark.xdist_group("after")
TOKEN = "hf_" + "aB3" * 11
WEIGHTS = "adapter_model.safetensors"


class Hub(BaseHTTPRequestHandler):
    """What of the Hub's HTTP API a push takes: create, preupload, git-lfs's batch and upload, validate-yaml, commit."""

    def answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        return body

    def do_PUT(self):
        body = self.read()
        self.server.large[sha256(body).hexdigest()] = body
        self.answer({})

    def do_POST(self):
        body, url = self.read(), f"http://127.0.0.1:{self.server.server_port}"
        code = self.server.fails.get(re.sub(r".*/", "", self.path))
        if code:
            return self.answer({"error": self.server.says}, code)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{url}/{self.server.created['organization']}/{self.server.created['name']}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            named = [{"path": file["path"], "uploadMode": mode} for file, mode in zip(files, modes, strict=True)]
            self.answer({"files": [file | {"shouldIgnore": False} for file in named]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            action = {"upload": {"href": f"{url}/put"}}
            self.answer({"transfer": "basic", "objects": [one | {"actions": action} for one in objects]})
        elif "/commit/" in self.path:
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"warnings": [], "errors": []})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.commits, server.large, server.fails, server.says = [], [], {}, {}, "no"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def plan(bits=8):
    return trained_models.load_trained(RECIPES[bits])


def pushed(server):
    """The files of the one commit, by name."""
    (lines,) = server.commits
    assert lines[0]["key"] == "header"
    files = {}
    for line in lines[1:]:
        value = line["value"]
        files[value["path"]] = (
            server.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        )
    return files


def test_a_dry_run_is_the_default_and_asks_nobody(runs, hub, capsys):
    names = publish.publish(plan(), "someone/Llama-finance")
    printed = capsys.readouterr().out
    assert not hub.asked and "PUSH=1" in printed and TOKEN not in printed
    assert "make eval RECIPE=sentiment_r8_dora BASE=1" in printed
    assert names == sorted(names, key=printed.index)
    for name in names:
        assert re.search(rf"^  {re.escape(name)} +\d+\.\d{{3}} MB$", printed, re.M), name
    assert (runs / RECIPES[8] / "publish" / "README.md").is_file()


def test_what_is_pushed_loads_and_nothing_else_goes(runs, hub, tiny_base, tmp_path, capsys):
    folder = runs / RECIPES[8]
    (folder / "checkpoint-2").mkdir()
    for name in (
        "checkpoint-2/optimizer.pt",
        "debug.log",
        "training_args.bin",
        "started.json",
        "model.bin",
        "README.md",
    ):
        (folder / name).write_text(TOKEN)
    names = publish.publish(plan(), "someone/Llama-finance", private=True, push=True)
    files = pushed(hub)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(files) == set(names) == {"README.md", "adapter_config.json", WEIGHTS} | tokenizer
    assert files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert hub.created["visibility"] == "private" and hub.created["organization"] == "someone"
    assert {token for path, token in hub.asked if path != "/put"} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in files.values())
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert capsys.readouterr().out.splitlines()[-1].endswith("/someone/Llama-finance")

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, content in files.items():
        (tmp_path / "clone").mkdir(exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "clone")
    assert loaded.peft_config["default"].use_dora
    assert AutoTokenizer.from_pretrained(tmp_path / "clone").chat_template
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == tiny_base.name


def test_the_merged_model_is_pushed_in_its_place(runs, hub, monkeypatch):
    with refuses("not there|missing", f"make merge RECIPE={RECIPES[16]}", file=f"outputs/{RECIPES[16]}/merged"):
        publish.publish(plan(16), "someone/Llama-finance", merged=True, push=True)
    assert not hub.asked
    folder = merge.run(plan(16), limit=0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # merging leaves the hub alone, in a process of its own
    publish.publish(plan(16), "someone/Llama-finance", merged=True, push=True)
    files = pushed(hub)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"config.json", "generation_config.json", "chat_template.jinja"} < set(files) and WEIGHTS not in files
    card = files["README.md"].decode()
    assert re.search("[Mm]erged into .*16-bit", card) and "library_name: transformers" in card


@pytest.fixture(params=["of make eval", "of a sweep"])
def evaluated(request, runs, tmp_path, monkeypatch):
    """Results of the 8-bit run and its base, made from rows that nobody had to ask a model for."""
    of_a_sweep = request.param == "of a sweep"  # beside the points' folders
    folder, facts = (runs if of_a_sweep else tmp_path) / "results", plan().facts
    for name, adapter, share in (("base", False, 0.6), (RECIPES[8], True, 0.86), ("another", True, 0.99)):
        digest = {"adapter_sha256": facts.sha256 if name == RECIPES[8] else "0" * 64} if adapter else {}
        answered(subject(folder, name, adapter=adapter, **digest), "fpb", label_rows(240, share, 2))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")


@pytest.mark.parametrize(
    ("base", "licence", "words"),
    [
        (
            "meta-llama/Llama-3.3-70B-Instruct",
            "llama3.3",
            "Llama 3.3 Community License](https://www.llama.com/llama3_3/",
        ),
        ("Qwen/Qwen3-8B", "apache-2.0", "licence of their base model, Qwen/Qwen3-8B"),
        ("someone/model", "other", "licence of their base model, someone/model"),
    ],
)
def test_the_licence_is_the_base_models(base, licence, words, runs):
    run = runs / RECIPES[8] / "recipe.yaml"
    run.write_text(yaml.safe_dump(yaml.safe_load(run.read_text()) | {"base_model": base}))
    names = publish.publish(plan(), "someone/finance")
    card = (runs / RECIPES[8] / "publish" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == licence and words in card
    assert ("NOTICE.txt" in names) == ("Built with Llama" in card) == licence.startswith("llama")


def test_the_card_says_what_is_known(runs, evaluated, monkeypatch):
    """As for a run on Llama-3.1 itself; of three evaluations it shows the one of this very adapter."""
    run = runs / RECIPES[8] / "recipe.yaml"
    run.write_text(yaml.safe_dump(yaml.safe_load(run.read_text()) | {"base_model": "meta-llama/Llama-3.1-8B-Instruct"}))
    names = publish.publish(plan(), "someone/finance")
    card = (runs / RECIPES[8] / "publish" / "README.md").read_text()
    about = yaml.safe_load(card.split("---")[1])
    assert about["license"] == "llama3.1" and about["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert about["library_name"] == "peft" and "datasets" not in about, "the rows were its author's own"
    assert "NOTICE.txt" in names and "Built with Llama" in card and "Llama 3.1 Community License" in card
    score = re.findall(r"^\| fpb \| published \| 240 \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| (\S+) \[", card, re.M)
    assert len(score) == 1
    value, low, high, difference = (float(text) for text in score[0])
    assert low < value < high and 80 < value < 92 and 10 < difference < 40
    for expected in (
        "load_in_8bit=True",
        'PeftModel.from_pretrained(base, "someone/finance")',
        "Test set `tfns`: https://huggingface.co/datasets/zeroshot/twitter-financial-news-sentiment. Licence: MIT.",
        "lora_r: 8",
        plan().facts.sha256,
    ):
        assert expected in card, expected
    assert re.search(r"DoRA .*r 8, alpha 16.* meta-llama/Llama-3\.1-8B-Instruct.* 8-bit", card)
    assert re.search(r"^\| TFNS: .*neutral.* positive", card, re.M) and re.search(r"\b475 .*\b1,566 ", card)
    assert "author" in card
    assert "Financial Math" not in card and "FinanceBench" not in card.replace("FinanceBench test 1", "")
    record = runs / RECIPES[8] / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"data_from": "raw"}))
    publish.publish(plan(), "someone/finance")
    raw = (runs / RECIPES[8] / "publish" / "README.md").read_text()
    assert "author" not in raw and "zeroshot/twitter-financial-news-sentiment" in raw.split("---")[1]
    compile(re.search(r"```python\n(.*?)```", card, re.S)[1], "card", "exec")


@pytest.mark.parametrize(
    ("place", "code", "says"),
    [
        ("create", 401, ["HF_TOKEN", "401, no", "huggingface.co"]),
        ("main", 403, ["HF_TOKEN", "403, no", "repository of yours|your"]),
        ("create", 500, ["500, no", "wait", "same command"]),
        ("validate-yaml", 500, ["500, no", "wait", "same command"]),
    ],
)
def test_a_hub_that_refuses_is_one_line(place, code, says, runs, hub, capsys):
    hub.fails, hub.says = {place: code}, "no"
    with refuses(*says, file="REPO=someone/Llama-x") as error:
        publish.publish(plan(), "someone/Llama-x", push=True)
    assert TOKEN not in str(error.value) and not hub.commits


def test_a_hub_that_repeats_the_token_or_is_not_there(runs, hub, monkeypatch):
    hub.fails, hub.says = {"create": 401}, f"bad token {TOKEN}"
    with refuses("HF_TOKEN", "401, bad token ***", file="REPO=someone/Llama-x") as error:
        publish.publish(plan(), "someone/Llama-x", push=True)
    assert TOKEN not in str(error.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with refuses("Hub", "reach", "same command", file="REPO=someone/Llama-x"):
        publish.publish(plan(), "someone/Llama-x", push=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refuses("HF_HUB_OFFLINE", "unset"):
        publish.publish(plan(), "someone/Llama-x", push=True)
    monkeypatch.setenv("HF_TOKEN", " ")
    with refuses("HF_TOKEN", "not set", "huggingface.co/settings/tokens"):
        publish.publish(plan(), "someone/Llama-x", push=True)


NAME = st.from_regex(r"\A[A-Za-z0-9](?:[A-Za-z0-9]|[-_.](?=[A-Za-z0-9])){0,40}\Z").filter(
    lambda name: not name.endswith(".git")
)


@given(user=NAME, name=NAME, spoilt=st.sampled_from(["", "/", " ", "..", "--", "ä", "\n", "\\", "?", "/x"]))
def test_a_repository_is_a_user_and_a_name(user, name, spoilt):
    repo = f"{user}/{name}"
    publish.check_repo(repo)
    bad = [name, f"/{name}", f"{repo}/", f"{repo}{spoilt}x/y" if spoilt == "/" else f"{user}{spoilt}{repo}/x"]
    for one in bad:
        with pytest.raises(UserError, match="^REPO=") as error:
            publish.check_repo(one)
        assert "/<model>" in str(error.value) and "96" in str(error.value)


def test_a_home_that_is_the_root_is_not_a_place_of_this_machine(monkeypatch):
    """As in a container whose user has no account: every address has two strokes."""
    monkeypatch.setenv("HOME", "/")
    publish.check_text("README.md", b"[FinLoRA](https://arxiv.org/abs/2505.19819)")
    for home in ("/home/me", "/"):
        monkeypatch.setenv("HOME", home)
        with refuses("path", "this machine", "remove", file="README.md"):
            publish.check_text("README.md", f"from /home/me/x and {publish.ROOT}".encode())


PATHS = {
    "of Linux": "/scratch/alice/models/llama",
    "in a mount of one part and a file": "/data/rows.jsonl",
    "of macOS": "/Users/alice/llama",
    "of Windows": "C:\\\\Users\\\\alice",
    "below home": "~/models/llama",
    "a file's address": "file:///srv/llama/config.json",
}
HARMLESS = (
    "https://arxiv.org/abs/2505.19819",
    "meta-llama/Llama-3.1-8B",
    "outputs/x/merged",
    "0.0/0.01",
    "</think>",
    "a / b",
)


@pytest.mark.parametrize("case", PATHS)
@pytest.mark.parametrize("around", ['{{"base": "{}"}}', "base_model: {}\n", "`{}`", "| {} |", "({})", "--model={}"])
def test_any_absolute_path_is_found(case, around):
    with refuses("path", "this machine", "remove", file="config.json"):
        publish.check_text("config.json", around.format(PATHS[case]).encode())
    for text in HARMLESS:
        publish.check_text("config.json", around.format(text).encode())
    publish.check_text("tokenizer.json", around.format("/usr/bin").encode())  # a word of its vocabulary


def test_what_is_published_holds_no_path_of_this_machine(runs, hub, tiny_base, tmp_path, monkeypatch):
    """A base and rows in folders outside the checkout, one with a space, HOME in a comment, options with a path."""
    monkeypatch.setenv("HOME", "/home/alice")
    folder, base = runs / RECIPES[8], "/scratch/alice/my models/tiny-llama"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["base_model"] = base
    recipe["datasets"][0]["path"] = "/data/alice/rows.jsonl"
    text = yaml.safe_dump(recipe) + "# copied from /home/alice/finlora/mine.yaml and ~/notes/x.txt\n"
    (folder / "recipe.yaml").write_text(text)
    record = json.loads((folder / "run.json").read_text())
    record |= {"args": ["--deepspeed", "/opt/zero/stage1.json"], "data": {"/data/alice/rows.jsonl": "0" * 64}}
    record["base_model"] = base
    (folder / "run.json").write_text(json.dumps(record))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"name_or_path": base}))
    publish.publish(plan(), "someone/finance", push=True)
    files = pushed(hub)
    texts = {name: content for name, content in files.items() if name != WEIGHTS}
    for name, content in texts.items():
        for path in ("/scratch", "/home/alice", "/data/alice", "/opt/zero", "~/", str(tmp_path)):
            assert path.encode() not in content, (name, path)
    card = files["README.md"].decode()
    assert "base_model: tiny-llama" in card and "path: rows.jsonl" in card and "--deepspeed stage1.json" in card
    assert "copied from mine.yaml and x.txt" in card and '"tiny-llama"' in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny-llama"
    about = json.loads(files["tokenizer_config.json"])
    assert about["name_or_path"] == "tiny-llama" and about["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_path_in_the_header_of_the_weights_is_found(runs):
    path = runs / RECIPES[8] / WEIGHTS
    save_file(load_file(path), path, {"format": "pt", "from": "/home/alice/outputs"})
    record = runs / RECIPES[8] / "run.json"
    about = json.loads(record.read_text())
    about["adapter"]["sha256"] = sha256(path.read_bytes()).hexdigest()
    record.write_text(json.dumps(about))
    with refuses("path", "/home/alice/outputs", file=WEIGHTS):
        publish.publish(plan(), "someone/finance")


@given(
    text=st.text(max_size=60),
    kind=st.sampled_from(["hf_{}", "sk-{}", "ghp_{}"]),
    key=st.from_regex(r"\A[A-Za-z0-9]{36}\Z"),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_with_a_secret_or_a_path_of_this_machine_goes(text, kind, key, tmp_path):
    secret = kind.format(key)
    for planted, word in ((secret, "secret"), (f"{publish.ROOT}/x", "path")):
        with refuses(word, "remove", file="config.json") as error:
            publish.check_text("config.json", f"{text} {planted} {text}".encode())
        assert key not in str(error.value)
