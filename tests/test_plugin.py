"""The plugin under axolotl's own commands: what it refuses, what it sets right, and that equal runs are equal."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from failures import refuses, says
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fastdora.plugin import rows
from fastdora.plugin.keys import RecipeError
from finlora.export import merge
from finlora.models import trained
from finlora.recipes import bases

pytestmark = pytest.mark.xdist_group("axolotl")

ROOT = Path(__file__).resolve().parent.parent
WORDS = "rose fell gained lost grew shrank climbed slid".split()


@pytest.fixture(scope="module")
def axolotl():
    from forked import axolotl_command

    return axolotl_command


def write_rows(path: Path, count: int, answer=lambda i: "up" if i % 2 else "down") -> None:
    rows = [
        {"messages": [
            {"role": "user", "content": f"Shares of company {i} {WORDS[i % 8]}."},
            {"role": "assistant", "content": answer(i)},
        ]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path, tiny_base):
    """A function that writes a small recipe with changes (None removes a key) and returns its path."""
    write_rows(tmp_path / "train.jsonl", 40)
    write_rows(tmp_path / "validation.jsonl", 12)
    base = yaml.safe_load((ROOT / "recipes" / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))
    data = {"ds_type": "json", "split": "train", "type": "chat_template", "field_messages": "messages"}
    base |= {
        "base_model": str(tiny_base),
        "datasets": [{"path": str(tmp_path / "train.jsonl"), **data}],
        "test_datasets": [{"path": str(tmp_path / "validation.jsonl"), **data}],
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "tokenised"),
        "sequence_len": 128,
        "max_steps": 3,
        "eval_sample_packing": False,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    for key in ("evals_per_epoch", "saves_per_epoch"):
        del base[key]

    def write(**changes) -> str:
        keys = {key: value for key, value in (base | changes).items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(keys), encoding="utf-8")
        return str(path)

    return write


def train(axolotl, path: str) -> tuple[int, str]:
    return axolotl("train", path, "--launcher", "python")


def refused(output: str, *words: str, **place) -> str:
    """The only `error: ` of axolotl's output says all this (tests/failures.py), and there is no traceback."""
    assert "Traceback" not in output, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return says(line.removeprefix("error: "), *words, **place)


def adapter_hash(tmp_path: Path) -> str:
    return hashlib.sha256((tmp_path / "out" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("bits", [pytest.param(16, marks=pytest.mark.slow), 8, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_runs_give_equal_adapters(axolotl, recipe, tmp_path, bits):
    changes = {
        "load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4,
        "adapter": "qlora" if bits == 4 else "lora",
        "lora_dropout": 0.1,
    }
    hashes = []
    for seed in (42, 42, 43):
        code, output = train(axolotl, recipe(seed=seed, **changes))
        assert code == 0, output[-3000:]
        hashes.append(adapter_hash(tmp_path))
    assert hashes[0] == hashes[1] != hashes[2]


def test_unknown_key_stops_axolotl_itself(axolotl, recipe):
    path = recipe(lora_dropuot=0.1)
    code, output = train(axolotl, path)
    assert code == 1
    refused(output, "unknown", "did you mean 'lora_dropout'", file=path, key="lora_dropuot")


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"adapter": None, "load_in_8bit": False}, "adapter", ["no layer", "set `adapter: lora`"]),
        ({"lora_target_modules": ["q_proj", "k_prj"]}, "lora_target_modules", ["'k_prj'", "not a layer"]),
        ({"load_in_8bit": False, "load_in_4bit": True}, "load_in_4bit", ["not Linear4bit", "4-bit"]),
        ({"lora_rank_pattern": {"o_proj": 4}}, "lora_rank_pattern", ["o_proj", "no adapted layer", "fix"]),
        ({"context_parallel_size": 2}, "context_parallel_size", ["whole rows", "remove it"]),
        (
            {"context_parallel_size": 2, "attn_implementation": "flash_attention_2", "fastdora_shared_prefixes": False},
            "context_parallel_size",
            ["whole rows", "remove it"],
        ),
        ({"sequence_parallel_degree": 2}, "sequence_parallel_degree", ["whole rows", "remove it"]),
        ({"fastdora_layers": "slow"}, "fastdora_layers", ["'slow'", "'fast', 'peft'"]),
        (
            {"fastdora_fp8": True, "load_in_8bit": False},
            "fastdora_fp8",
            ["needs load_in_8bit: true", "fastdora_layers: fast"],
        ),
        (
            {"load_in_8bit": False, "lora_target_modules": ["q_proj", "embed_tokens"]},
            None,
            ["embed_tokens", "Embedding", "linear layers only", "set fastdora_layers: peft"],
        ),
    ],
)
def test_what_would_train_something_else_is_refused(axolotl, recipe, changes, key, words):
    path = recipe(**changes)
    code, output = train(axolotl, path)
    assert code == 1
    refused(output, *words, file=path, key=key)


@pytest.mark.parametrize("layers", ["fast", pytest.param("peft", marks=pytest.mark.slow)])
def test_ranks_and_alphas_by_module_and_a_whole_head(axolotl, recipe, tmp_path, tiny_base, layers, monkeypatch):
    """The merged model has the head as trained, and the logits of base and adapter, which merging verifies."""
    path = recipe(
        fastdora_layers=layers,
        lora_target_modules=None,
        lora_target_linear=True,
        lora_rank_pattern={r"layers\.[01]\.self_attn\.q_proj": 2, "down_proj": 16},
        lora_alpha_pattern={"down_proj": 4},
        lora_modules_to_save=["lm_head"],
        learning_rate=0.05,
    )
    code, output = train(axolotl, path)
    assert code == 0, output[-3000:]
    assert layers == "peft" or "fastdora: 28 8-bit DoRA layers" in output

    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {name.removeprefix("base_model.model.").partition(".lora_A")[0]: tensor.shape[0]
             for name, tensor in adapter.items() if "lora_A" in name}  # fmt: skip
    keys, shape = yaml.safe_load(Path(path).read_text(encoding="utf-8")), bases.shape(str(tiny_base))
    names = [name for target in bases.targets(keys, shape) for name in bases.layer_names(target, shape)]
    assert ranks == {name: bases.rank_of(keys, name) for name in names}
    assert sorted(ranks.values()) == [2] * 2 + [8] * 22 + [16] * 4
    assert sum(tensor.numel() for tensor in adapter.values()) == bases.trainable_parameters(keys, shape)

    monkeypatch.setattr(trained, "OUTPUTS", tmp_path)
    folder = merge.run(trained.load_trained(adapter=str(tmp_path / "out"), bits=8), limit=0)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, adapter["base_model.model.lm_head.weight"].to(torch.bfloat16))
    untrained = load_file(tiny_base / "model.safetensors")["lm_head.weight"]
    assert (head - untrained).abs().max() > 0.01


def test_fp8_products_train_and_the_log_says_so(axolotl, recipe):
    """On a CPU the same formulas without the matrix unit."""
    code, output = train(axolotl, recipe(fastdora_fp8=True, max_steps=1))
    assert code == 0, output[-3000:]
    assert "fastdora: 12 8-bit DoRA, 16 8-bit frozen layers; fp8 matmuls" in output
    assert "fastdora: off without a GPU: liger_rope, liger_rms_norm, liger_glu_activation" in output


def test_what_axolotl_refuses_is_said_in_one_line(axolotl, recipe):
    path = recipe(save_steps=5, saves_per_epoch=4, save_strategy=None)
    code, output = train(axolotl, path)
    assert code == 1
    refused(output, "saves_per_epoch", "mutually exclusive", file=path, key="save_steps")


def test_rows_too_long_are_refused(axolotl, recipe, tmp_path):
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        long = {"role": "user", "content": "profit " * 300}
        file.write(json.dumps({"messages": [long, {"role": "assistant", "content": "up"}]}) + "\n")
    path = recipe()
    code, output = axolotl("preprocess", path)
    assert code == 1
    refused(output, "excess_length_strategy", file=path, key="sequence_len")
    code, output = axolotl("preprocess", recipe(excess_length_strategy="drop"))
    assert code == 0 and "train: 40 rows" in output and "1 left out as excess_length_strategy says" in output


def test_a_row_that_is_longer_than_the_bases_positions_is_refused(axolotl, recipe, tmp_path, tiny_base):
    """Packs may be: in them each row has positions of its own."""
    base = tmp_path / "short"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}), encoding="utf-8")
    code, output = axolotl("preprocess", path := recipe(base_model=str(base)))
    assert code == 1
    refused(output, "16 positions", "set it to 16", file=path, key="sequence_len")


def test_rows_that_fill_no_batch_are_refused(axolotl, recipe, tmp_path):
    """Axolotl would end with exit code 0, and with an adapter that was not trained."""
    write_rows(tmp_path / "train.jsonl", 3)
    code, output = train(axolotl, path := recipe(micro_batch_size=4, sequence_len=256, fastdora_shared_prefixes=False))
    assert code == 1 and not (tmp_path / "out" / "adapter_model.safetensors").exists()
    refused(output, "fill no batch of 4 packs", "lower it", file=path, key="micro_batch_size")


@pytest.mark.parametrize(
    "message, key, words",
    [
        (
            "eval dataset split is too small for sample_packing.",
            "eval_sample_packing",
            ["no pack", "set it to false"],
        ),
        ("Sequence encountered with 9 tokens, which exceeds the maximum 8.", "sequence_len", ["9 tokens", "raise it"]),
        ("no train split found for dataset {a}\nmore", "datasets", ["no train split found for dataset {a}"]),
    ],
)
def test_what_axolotl_refuses_in_rows_names_its_key(message, key, words, monkeypatch, tmp_path):
    """In place of axolotl's loading stands its error: each needs rows of its own, and seconds."""

    def load(cfg):
        raise ValueError(message)

    monkeypatch.setattr(rows, "load_datasets", load)
    cfg = DictDefault({"axolotl_config_path": "mine.yaml", "base_model": str(tmp_path), "datasets": []})
    with refuses(*words, error=RecipeError, file="mine.yaml", key=key):
        rows.load(cfg)


def test_a_data_file_that_is_gone_or_goes_meanwhile_is_no_other_number_of_rows(monkeypatch, tmp_path):
    """Its rows are counted before axolotl reads them, which stands here for what happens to the file meanwhile."""
    file = tmp_path / "train.jsonl"
    file.write_text("{}\n{}\n\n{}\n", encoding="utf-8")
    train = Dataset.from_dict({"labels": [[-100, 5, 7]] * 3})

    def load(cfg):
        file.unlink()
        return SimpleNamespace(train_dataset=train, eval_dataset=None)

    monkeypatch.setattr(rows, "load_datasets", load)
    monkeypatch.setattr(rows, "load_model_config", lambda cfg: None)
    entry = {"path": str(file)}
    cfg = DictDefault({"axolotl_config_path": "mine.yaml", "base_model": str(tmp_path), "datasets": [entry]})
    assert len(rows.load(cfg).train_dataset) == 3
    with refuses(str(file), "No such file", "name a file", error=RecipeError, file="mine.yaml", key="datasets"):
        rows.load(cfg)


def test_rows_without_an_answer_are_refused(axolotl, recipe, tmp_path):
    path, rows = recipe(), tmp_path / "train.jsonl"
    write_rows(rows, 40, lambda i: "gone" if i == 7 else "up")
    rows.write_text(rows.read_text().replace('"assistant", "content": "gone"', '"user", "content": "gone"'))
    code, output = axolotl("preprocess", path)
    assert code == 1
    refused(output, "1 of 40 train rows", "would not train", file=path)


def test_a_token_that_the_base_does_not_have_is_refused(axolotl, recipe):
    """Axolotl would add it, and a row to the embeddings that no base model has."""
    code, output = axolotl("preprocess", path := recipe(special_tokens={"pad_token": "<|pad|>"}))
    assert code == 1
    refused(output, "<|pad|> is no token", "take one that is", file=path, key="special_tokens")


def test_a_prompt_that_teaches_no_end_is_refused_before_the_rows_are_tokenized(axolotl, recipe, tmp_path):
    path = recipe(special_tokens={"eos_token": "<|end_of_text|>"})  # as the base model's tokenizer has it
    code, output = axolotl("train", path, "--launcher", "python")
    assert code == 1 and not (tmp_path / "tokenised").exists()
    refused(output, "<|eot_id|>", "no answer would end", "set eot_tokens", file=path, key="eot_tokens")


def test_a_changed_data_file_is_never_trained_from_the_cache(axolotl, recipe, tmp_path):
    path = recipe(max_steps=1)
    assert axolotl("preprocess", path)[0] == 0
    code, output = train(axolotl, path)
    assert code == 0 and "Loading prepared dataset from disk" in output
    write_rows(tmp_path / "train.jsonl", 44)
    code, output = train(axolotl, path)
    assert code == 0 and "train: 44 rows" in output


def test_a_changed_template_or_tokenizer_has_a_cache_of_its_own(tmp_path, monkeypatch):
    """Axolotl's own key has a template's path, not its text: another prompt's tokens would train."""
    from axolotl.utils.dict import DictDefault

    from fastdora.plugin import rows

    monkeypatch.chdir(tmp_path)
    files = [
        tmp_path / "prompt.jinja",
        tmp_path / "base" / "tokenizer.json",
        tmp_path / "base" / "tokenizer_config.json",
    ]
    (tmp_path / "base").mkdir()
    cfg = DictDefault({"base_model": "base", "chat_template_jinja": "prompt.jinja", "dataset_prepared_path": "tokens"})
    folders = [rows._content_addressed(cfg)]
    for file in files:
        file.write_text("{{ messages }}", encoding="utf-8")
        folders.append(rows._content_addressed(cfg))
    files[0].write_text("{{ messages[0] }}", encoding="utf-8")
    folders.append(rows._content_addressed(cfg))
    assert len(set(folders)) == len(folders) == 5 and rows._content_addressed(cfg) == folders[-1]


def test_rows_and_tokens_are_stated(axolotl, recipe):
    code, output = axolotl("preprocess", recipe())
    assert code == 0 and "train: 40 rows, " in output and "validation: 12 rows, " in output


def test_metrics(axolotl, recipe, tmp_path):
    code, output = train(axolotl, recipe(fastdora_shared_prefixes=False))
    assert code == 0, output[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 3 and metrics["base_layers"] == {"Linear8bitLt": 12} and not metrics["interrupted"]
    # Three packs of 128 tokens out of rows of about 20 hold between 9 and 21 rows.
    assert 9 <= metrics["samples"] <= 21 and 200 < metrics["tokens"] <= 3 * 128
    assert not (tmp_path / "out" / "stepping").exists()


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_axolotls_loader_accepts_recipes(step):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    from finlora.recipes import load as recipes
    from finlora.recipes import names as recipe_names

    gpu = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    for name in recipe_names.names()[::step]:
        cfg = DictDefault(recipes.load(recipe_names.RECIPES / f"{name}.yaml").keys)
        cfg.axolotl_config_path = str(recipe_names.RECIPES / f"{name}.yaml")
        prepare_plugins(cfg)
        valid = validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})
        assert valid.lora_r == cfg.lora_r and valid.tf32 is True, name
    assert "fastdora.FastDoraPlugin" in PluginManager.get_instance().plugins


def test_the_8b_recipe_is_accepted_up_to_the_missing_base_model(axolotl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # axolotl writes its log into the recipe's output folder
    code, output = train(axolotl, str(ROOT / "recipes" / "sentiment_r8_dora.yaml"))
    assert code != 0 and "Plugin loaded successfully: fastdora.FastDoraPlugin" in output
    # Every key passed; what is missing is the base model, which axolotl asks the hub for.
    assert not any(line.startswith("error: ") for line in output.splitlines())
    assert "load_model_config" in output and "offline mode" in output[-500:]


@pytest.mark.parametrize(
    "why, changes",
    [
        (None, {}),
        ("several processes, under which .* FASTDORA_DDP_GRAPHS=1", {"WORLD_SIZE": "2"}),
        (None, {"WORLD_SIZE": "2", "FASTDORA_DDP_GRAPHS": "1"}),
        ("gradient_checkpointing", {"gradient_checkpointing": True}),
        ("deepspeed", {"deepspeed": "zero2.json"}),
        ("fsdp_config", {"fsdp_config": {"offload_params": False}}),
        ("fastdora_layers: peft", {"fastdora_layers": "peft"}),
        ("without sample_packing and attn_implementation: sdpa", {"sample_packing": False}),
    ],
)
def test_where_cuda_graphs_are_off_on_a_gpu(monkeypatch, why, changes):
    from axolotl.utils.dict import DictDefault

    from fastdora.plugin import plugin

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, default in (("WORLD_SIZE", "1"), ("FASTDORA_DDP_GRAPHS", "")):
        monkeypatch.setenv(name, changes.pop(name, default))
    recipe = yaml.safe_load((ROOT / "recipes" / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))
    reason = plugin._why_no_graphs(DictDefault(recipe | changes))
    assert reason is None if why is None else re.match(why, reason)


@pytest.mark.parametrize(
    "pattern, words",
    [
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            ["q_proj", "trainable base weight", "freeze it", "set fastdora_layers: peft"],
        ),
        ("nowhere", ["unfrozen_parameters", "nothing is left", "remove"]),
    ],
)
def test_what_is_unfrozen_after_loading_is_looked_at(axolotl, recipe, pattern, words):
    path = recipe(unfrozen_parameters=[pattern], load_in_8bit=False)
    code, output = train(axolotl, path)
    assert code == 1
    refused(output, *words, file=path)


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}, {"deepspeed": "zero2.json"}])
def test_the_embeddings_output_has_no_gradient_where_nobody_reads_it(keys):
    from fastdora.plugin.plugin import FastDoraPlugin

    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=8, num_hidden_layers=1))
    model.enable_input_require_grads()  # as axolotl does for every adapter
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    recipe = dict(adapter="lora", lora_target_modules=["q_proj"], lora_r=2, lora_alpha=4, fastdora_layers="fast")
    FastDoraPlugin().post_model_load(DictDefault(recipe | keys), model)
    out = model.get_input_embeddings()(torch.tensor([1]))
    assert out.requires_grad == bool(keys)


@pytest.mark.parametrize("workers", [None, 1])
def test_on_a_cpu_no_process_is_forked_for_the_data(recipe, monkeypatch, workers):
    from axolotl.utils.dict import DictDefault

    from fastdora import FastDoraPlugin

    path = recipe(**{"dataloader_num_workers": workers} if workers else {})
    cfg = DictDefault(yaml.safe_load(Path(path).read_text(encoding="utf-8")) | {"axolotl_config_path": str(path)})
    monkeypatch.setattr("gc.freeze", lambda: None)
    FastDoraPlugin().register(cfg)
    assert cfg.dataloader_num_workers == (workers or 0)
