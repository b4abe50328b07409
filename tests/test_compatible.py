"""Saved models and tokenizers are read alike by this transformers and by version 4, in an environment of its own."""

import json
import os
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from failures import refuses
from runs import RECIPES
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from finlora.core import compatible
from finlora.core.paths import ROOT
from finlora.export import merge
from finlora.models import trained as trained_models

pytestmark = pytest.mark.xdist_group("after")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0], "partial_rotary_factor": 0.75}
CONFIGS = {
    "llama": LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}, **SIZES),
    "qwen3": Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **SIZES),
    "mistral": MistralConfig(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **SIZES),
    "phi3": Phi3Config(
        rope_parameters={"rope_type": "longrope", "rope_theta": 20000.0, **LONGROPE},
        original_max_position_embeddings=4096,
        **SIZES,
    ),
}
IDS = torch.arange(3, 60)[None]


def saved(folder: Path, tiny_base: Path, kind: str) -> torch.Tensor:
    """A model of this kind with a tokenizer that has special tokens of its own and a template; the model's logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}<|extra|>"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    compatible.make_compatible(folder)
    return model(IDS).logits.detach()


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_names_of_a_setting_are_written_and_this_version_reads_the_same(kind, tiny_base, tmp_path):
    expected = saved(tmp_path, tiny_base, kind)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits, expected)
    config, rope = json.loads((tmp_path / "config.json").read_text()), CONFIGS[kind].rope_parameters
    assert config["rope_theta"] == rope["rope_theta"] and config["torch_dtype"] == config["dtype"] == "float32"
    scaling = {
        "llama": {"rope_type": "llama3", **LLAMA3},
        "phi3": {"type": "longrope", "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]},
    }
    assert config["rope_scaling"] == scaling.get(kind)
    assert kind != "phi3" or config["partial_rotary_factor"] == 0.75
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in about
    assert about["additional_special_tokens"] == ["<|extra|>"] and "local_files_only" not in about
    assert about["chat_template"] == (tmp_path / "chat_template.jinja").read_text()
    assert "<|extra|>" in AutoTokenizer.from_pretrained(tmp_path).all_special_tokens


def test_a_second_time_changes_nothing_and_a_folder_without_them_is_left(tiny_base, tmp_path):
    saved(tmp_path / "model", tiny_base, "llama")
    files = {path: path.read_bytes() for path in (tmp_path / "model").glob("*.json")}
    compatible.make_compatible(tmp_path / "model")
    assert files == {path: path.read_bytes() for path in files}
    (tmp_path / "empty").mkdir()
    compatible.make_compatible(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_a_tokenizer_that_transformers_takes_for_another_is_told(tiny_base, tmp_path):
    """It reads the tokenizer beside any Qwen2 model as Qwen's own, which splits numbers into digits."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    trained = SimpleNamespace(adapter="outputs/x", base_model="some/qwen2")
    rows = [tokenizer("Sales rose 13.1 %")["input_ids"]]
    for kind, told in {"llama": False, "qwen2": True}.items():
        CONFIGS.get(kind, Qwen2Config(**SIZES)).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        compatible.make_compatible(tmp_path / kind)
        with refuses("tokenizer", "some/qwen2", "other tokens", file="outputs/x") if told else nullcontext():
            merge.check_tokenizer(trained, tokenizer, tmp_path / kind, rows)


@pytest.fixture(scope="module")
def version_4() -> dict[str, str]:
    """The environment variables of a Python with transformers 4 and this one's torch, installed once in .cache."""
    folder = ROOT / ".cache" / "transformers-4"
    if not (folder / "torch").exists():
        packages = ["transformers==4.57.3", "jinja2", "networkx", "sympy"]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *packages]
        if subprocess.run(pip, capture_output=True).returncode:
            pytest.skip("transformers 4 cannot be installed here (no package index): it was not tested")
        site = Path(sysconfig.get_path("purelib"))
        for path in (*site.glob("torch-*"), site / "torchgen", site / "functorch", site / "torch"):
            (folder / path.name).symlink_to(path)
    return os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.")
texts = ["profit rose 13.1 %<|extra|>", "<|eot_id|> a , b"]
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    torch.save(model(ids).logits.detach(), f"{folder}/logits.pt")
    loaded = {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "prompt": tokenizer.apply_chat_template([{"role": "user", "content": "up?"}], tokenize=False),
        "special": sorted(tokenizer.all_special_tokens),
        "ends": model.generation_config.eos_token_id,
        "dtype": str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype),
    }
    print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_version_4_reads_the_same(version_4, runs, tiny_base, tmp_path):
    merged = merge.run(trained_models.load_trained(RECIPES[16]), limit=0)
    folders = {kind: tmp_path / kind for kind in CONFIGS} | {"merged": merged}
    expected = {kind: saved(tmp_path / kind, tiny_base, kind) for kind in CONFIGS}
    expected["merged"] = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(IDS).logits.detach()
    # -S: without this environment's packages, which version 4 would take for its own.
    command = [sys.executable, "-S", "-c", READ, *map(str, folders.values())]
    done = subprocess.run(command, env=version_4, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for (kind, folder), line in zip(folders.items(), done.stdout.splitlines(), strict=True):
        theirs, ours = json.loads(line), AutoTokenizer.from_pretrained(folder)
        assert torch.equal(torch.load(folder / "logits.pt"), expected[kind]), kind
        assert theirs["special"] == sorted(ours.all_special_tokens)
        assert theirs["prompt"] == ours.apply_chat_template([{"role": "user", "content": "up?"}], tokenize=False)
        assert theirs["ids"] == [
            ours(text)["input_ids"] for text in ("profit rose 13.1 %<|extra|>", "<|eot_id|> a , b")
        ]
        assert theirs["ends"] == GenerationConfig.from_pretrained(folder).eos_token_id
    assert theirs["dtype"] == "torch.bfloat16"
