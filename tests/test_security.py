"""No code from elsewhere, no pickle, no secret in a file, no path out of the repository."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from failures import refuses, says
from hypothesis import given
from hypothesis import strategies as st
from kills import recipe as small_recipe

from fastdora.plugin import safety
from fastdora.plugin.keys import RecipeError
from finlora.recipes import bases, rules
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names

ROOT = Path(__file__).resolve().parent.parent
RECIPE = recipes.load(recipe_names.RECIPES / "sentiment_r8_dora.yaml").keys


def planted(key: str, value, depth: int):
    node = {key: value}
    for level in range(depth):
        node = {"datasets": [{"path": "x"}, node]} if level % 2 else {"extra": node}
    return node


@given(
    key=st.sampled_from(["trust_remote_code", "use_kernels"]),
    depth=st.integers(0, 4),
)
def test_code_from_the_hub_is_refused_at_any_depth(key, depth):
    with refuses(f"{key}'", "runs code", "remove", error=RecipeError, file="a.yaml"):
        safety.check(RECIPE | planted(key, True, depth), "a.yaml")
    safety.check(RECIPE | planted(key, False, depth), "a.yaml")


@given(
    key=st.sampled_from(["hub_token", "comet_api_key", "token", "aws_secret_access_key", "my_password"]) | st.none(),
    text=st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=20, max_size=40),
    depth=st.integers(0, 4),
)
def test_secrets_are_refused_at_any_depth_and_never_repeated(key, text, depth):
    value = text if key else f"see hf_{text}"
    with refuses(
        f"{key or 'wandb_name'}'", "secret", "remove", "environment", error=RecipeError, file="a.yaml"
    ) as error:
        safety.check(planted(key or "wandb_name", value, depth), "a.yaml")
    assert text not in str(error.value)


def test_no_recipe_here_is_refused():
    for path in map(recipe_names.find, recipe_names.names()):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        safety.check(recipe, str(path))
        rules.check_paths(recipes.Recipe(path, recipe))


def test_pickled_base_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with refuses("pickles", "convert", error=RecipeError, file="a.yaml", key="base_model"):
        safety.check({"base_model": str(tmp_path)}, "a.yaml")
    (tmp_path / "model.safetensors").write_bytes(b"")
    safety.check({"base_model": str(tmp_path)}, "a.yaml")


@pytest.mark.xdist_group("axolotl")
def test_axolotls_own_command_is_guarded_too(tmp_path, tiny_base):
    from forked import axolotl_command

    path = small_recipe(tmp_path, "run", tiny_base, trust_remote_code=True)
    code, output = axolotl_command("train", str(path), "--launcher", "python")
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    says(line.removeprefix("error: "), "runs code", "remove", file=path, key="trust_remote_code")


@pytest.mark.parametrize("path", ["/etc", "../elsewhere", "outputs/../../x", "data/prepared", "outputs/link/out"])
@pytest.mark.parametrize("key", ["output_dir", "dataset_prepared_path"])
def test_outputs_stay_in_their_folder(path, key, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "ROOT", tmp_path / "house")
    (tmp_path / "house" / "outputs").mkdir(parents=True)
    (tmp_path / "house" / "outputs" / "link").symlink_to(tmp_path)
    rules.check_paths(recipes.Recipe(Path("a.yaml"), RECIPE))
    with refuses(path, "outputs/", "name a folder", file="a.yaml", key=key):
        rules.check_paths(recipes.Recipe(Path("a.yaml"), RECIPE | {key: path}))


@pytest.mark.parametrize("file", ["/etc/passwd", "../other.jsonl", "data/../../x.jsonl", "data/link/x.jsonl"])
@pytest.mark.parametrize("key", ["datasets", "test_datasets"])
def test_data_stays_in_the_repository(file, key, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "ROOT", tmp_path / "house")
    (tmp_path / "house" / "data").mkdir(parents=True)
    (tmp_path / "house" / "data" / "link").symlink_to(tmp_path)
    with refuses(file, "out of the repository", "copy it to data/", file="a.yaml", key=key):
        rules.check_paths(recipes.Recipe(Path("a.yaml"), RECIPE | {key: [RECIPE[key][0] | {"path": file}]}))


def test_folders_may_be_links_or_mounts_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "ROOT", tmp_path / "house")
    (tmp_path / "house" / "data").mkdir(parents=True)
    for name in ("outputs", "data/prepared"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (tmp_path / "house" / name).symlink_to(tmp_path / "disk" / name)
    rules.check_paths(recipes.Recipe(Path("a.yaml"), RECIPE))


def test_a_base_model_comes_as_safetensors_and_text_alone(tmp_path, monkeypatch, capsys):
    """The hub's client is stood in for; what it is asked for, and what its errors become, is ours."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    asked = {}

    def download(name, **options):
        asked.update(options)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with refuses("has no safetensors", "choose", file="a.yaml", key="base_model"):
        bases.fetch_base(Path("a.yaml"), RECIPE)
    (tmp_path / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    bases.fetch_base(Path("a.yaml"), RECIPE)
    assert RECIPE["base_model"] in capsys.readouterr().err  # told, since it may take minutes
    names = ["model-00001-of-00004.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling_llama.py", "a.pth"]
    from huggingface_hub.utils import filter_repo_objects

    options = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    kept = list(filter_repo_objects([*names, "original/params.json"], **options))
    assert kept == names[:2]

    def gated(name, **options):
        raise GatedRepoError("401", response=httpx.Response(401, request=httpx.Request("GET", "https://hub/")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with refuses(f"{RECIPE['base_model']} is gated", "licence", "set HF_TOKEN"):
        bases.fetch_base(Path("a.yaml"), RECIPE)


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.load",
    "np.load",
}


@pytest.mark.parametrize("folder", ["finlora", "fastdora", "eval", "bench"])
def test_no_code_of_ours_unpickles_or_runs_text(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {name.name.split(".")[0] for name in node.names} & FORBIDDEN_MODULES, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, where
            elif isinstance(node, ast.Call):
                name, options = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
                assert name not in FORBIDDEN_CALLS, f"{where}: {name}"
                if name == "yaml.load":
                    assert re.search("SafeLoader|StrictLoader|BaseLoader", ast.unparse(node)), where
                for option in ("shell", "trust_remote_code", "allow_pickle"):
                    assert option not in options or not getattr(options[option], "value", True), f"{where}: {option}"


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "constraints").glob("*.txt")))
def test_every_package_is_pinned(file):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib: pinned versions were not checked")
    lines = (ROOT / "constraints" / file).read_text(encoding="utf-8").splitlines()
    pins = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert len(pins) > 200 and all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!]+", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() in pinned, requirement


def test_the_audit_reads_every_list_of_pins():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "audit.yml").read_text(encoding="utf-8"))["jobs"]["audit"]
    files = {f"torch-{version}.txt" for version in job["strategy"]["matrix"]["torch"]}
    assert files == {file.name for file in (ROOT / "constraints").glob("*.txt")}
    assert "--strict" in job["steps"][-1]["run"]  # without it pip-audit passes what it could not look up


def test_no_recipe_reports_to_a_service():
    for recipe in recipe_names.names():
        keys = yaml.safe_load((recipe_names.RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
        assert not [key for key in keys if re.match("wandb|mlflow|comet|trackio|push|hub_|use_wandb", key)], recipe


@pytest.mark.parametrize("asked, value", [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_asked_for(asked, value, tmp_path):
    """With Python stood in for: what `make` tells axolotl is printed."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$AXOLOTL_DO_NOT_TRACK"\n', encoding="utf-8")
    python.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "AXOLOTL_DO_NOT_TRACK"}
    env |= {"AXOLOTL_DO_NOT_TRACK": asked} if asked else {}
    done = subprocess.run(["make", "recipes", f"VENV={tmp_path}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{value}\n"), done.stderr
