"""The checksums of what a run starts from: which files count, what is read again, and what has changed."""

import json
import os
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest

from fastdora.plugin import checksums
from fastdora.plugin.checksums import changed_files, changed_weights, starting_files


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(name.encode())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"A and B")
    (tmp_path / "adapter" / "tokenizer.json").write_bytes(b"not read in training")
    (tmp_path / "prompt.jinja").write_bytes(b"{{ messages }}")
    return tmp_path


def test_what_a_run_starts_from(root):
    """Files that decide weights and tokens; a template's text in the recipe is no file, nor is a model not fetched."""
    recipe = {"base_model": "base", "lora_model_dir": "adapter", "chat_template_jinja": "prompt.jinja"}
    files = starting_files(recipe, root)
    expected = {name: digest(name.encode()) for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert files["base"] == expected
    assert files["adapter"] == {"adapter_model.safetensors": digest(b"A and B")}
    assert files["prompt.jinja"] == {"": digest(b"{{ messages }}")}
    other = {"base_model": "me/not-fetched", "chat_template_jinja": "{{ messages }}\n" * 300}
    assert starting_files(other, root) == {}
    assert starting_files({"base_model": "not/a/hub/id"}, root) == {}


def test_a_template_that_only_one_dataset_has(root):
    recipe = {"base_model": "me/not-fetched", "datasets": [{"path": "a"}, {"chat_template_jinja": "prompt.jinja"}]}
    assert list(starting_files(recipe, root)) == ["prompt.jinja"]


def test_files_are_compared_in_the_models_that_both_have(root):
    before = starting_files({"base_model": "base", "lora_model_dir": "adapter"}, root)
    assert changed_files(before, before) == []
    (root / "base" / "model.safetensors").write_bytes(b"other")
    (root / "base" / "tokenizer.json").unlink()
    (root / "base" / "model-2.safetensors").write_bytes(b"new")
    now = starting_files({"base_model": "base"}, root)
    assert changed_files(before, now) == [
        "base/model-2.safetensors",
        "base/model.safetensors",
        "base/tokenizer.json",
    ]
    assert changed_weights(before, "base", "base", root) == ["base/model-2.safetensors", "base/model.safetensors"]
    (root / "base").rename(root / "moved")
    assert changed_weights(before, "base", "moved", root) == ["moved/model-2.safetensors", "moved/model.safetensors"]
    assert changed_weights(before, "base", "base", root) is None  # gone: what needs it says so
    assert changed_weights({}, "base", "moved", root) is None  # of a run that recorded none


def test_a_large_file_is_read_once_until_it_changes(root, monkeypatch):
    """Replaced by a copy of equal size and date, as `cp -p` and `rsync -t` leave it, it is read again."""
    monkeypatch.setattr(checksums, "LARGE", 5)
    (root / ".cache").mkdir()
    read, path = [], root / "base" / "model.safetensors"
    monkeypatch.setattr(checksums, "sha256", lambda path: read.append(path.name) or digest(path.read_bytes()))
    for _ in range(2):
        assert checksums.cached_sha256(path, root) == digest(b"model.safetensors")
    assert read == ["model.safetensors"]
    date = path.stat().st_mtime_ns
    path.write_bytes(b"other.safetensors")
    os.utime(path, ns=(date, date))
    assert checksums.cached_sha256(path, root) == digest(b"other.safetensors")
    (root / ".cache" / "checksums.json").write_text("{", encoding="utf-8")  # a broken cache costs time alone
    assert checksums.cached_sha256(path, root) == digest(b"other.safetensors")
    assert json.loads((root / ".cache" / "checksums.json").read_text(encoding="utf-8"))[str(path)][-1]


def test_where_there_is_no_cache_a_file_is_read_each_time(root, monkeypatch):
    monkeypatch.setattr(checksums, "LARGE", 5)
    assert checksums.cached_sha256(root / "prompt.jinja", root) == digest(b"{{ messages }}")
    assert not (root / ".cache").exists()


def test_a_hubs_model_is_told_by_the_names_of_its_blobs(root, monkeypatch):
    """The hub names each large file by its SHA-256; one that is fetched anew, after a push, has another name."""
    repo = root / "hub" / "models--me--base"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (blobs / ("a" * 64)).write_bytes(b"weights")
    (blobs / ("b" * 40)).write_bytes(b"{}")
    (snapshot / "model.safetensors").symlink_to(blobs / ("a" * 64))
    (snapshot / "config.json").symlink_to(blobs / ("b" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
    files = starting_files({"base_model": "me/base"}, root)
    assert files == {"me/base": {"model.safetensors": "a" * 64, "config.json": digest(b"{}")}}
