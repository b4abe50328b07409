"""Base models: the table, its sizes against transformers' own models, and a tiny one of each architecture all the way.

The architectures are those whose layers finlora/recipes/bases.py counts. Each tiny model has random weights, a head_dim
that is not hidden_size / heads, and a tokenizer with the special tokens of its kind.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from failures import refuses
from safetensors.torch import load_file
from test_prompts import LLAMA, MISTRAL, QWEN, configured, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdora.plugin import prompts
from finlora.plan import estimate
from finlora.recipes import bases, memory
from finlora.recipes import names as recipe_names

pytestmark = pytest.mark.xdist_group("axolotl")
TABLE = bases.load_bases()
ANSWER = "positive"
KEYS = yaml.safe_load((recipe_names.RECIPES / "formula_bf16_r8_dora.yaml").read_text(encoding="utf-8"))


def on_meta(config):
    """A model of this configuration without memory: shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("tag", TABLE)
def test_the_tables_sizes_are_those_of_transformers_model(tag):
    config = TABLE[tag].config
    model = on_meta(config)
    block = model.model.layers[0]
    linears = {name.rpartition(".")[2]: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name: (m.in_features, m.out_features) for name, m in linears.items()} == bases.linear_layers(config)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert sum(p.numel() for p in model.parameters()) == bases.parameters(config) + norms
    assert model.config.max_position_embeddings == config["max_position_embeddings"]
    recipe = KEYS | {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    assert bases.trainable_parameters(recipe, config) == trained_by_peft(model, recipe)


def trained_by_peft(model, recipe) -> int:
    from peft import LoraConfig, get_peft_model

    targets, rank = recipe["lora_target_modules"], recipe["lora_r"]
    adapter = LoraConfig(r=rank, target_modules=targets, use_dora=recipe["peft_use_dora"], task_type="CAUSAL_LM")
    return sum(p.numel() for p in get_peft_model(model, adapter).parameters() if p.requires_grad)


ATTENTION, FUSED = ["q_proj", "k_proj", "v_proj", "o_proj"], ["qkv_proj", "o_proj", "gate_up_proj"]
# By architecture: the special tokens, the end of an answer, the beginning of the text, the recipe's own keys.
KINDS = {
    "llama": (LLAMA + ["<|finetune_right_pad_id|>"], "<|eot_id|>", LLAMA[0], TABLE["llama32_1b"].recipe.keys),
    "qwen3": (QWEN, "<|im_end|>", None, TABLE["qwen3_8b"].recipe.keys),
    "mistral": (MISTRAL + ["<unk>"], "</s>", "<s>", TABLE["mistral_7b"].recipe.keys),
    "phi3": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        "<|end|>",
        None,
        {"chat_template": "phi_35", "special_tokens": {"pad_token": "<|endoftext|>"}, "lora_target_modules": FUSED},
    ),
}


def tiny(folder: Path, kind: str) -> dict:
    """A random model of this architecture with its tokenizer in a folder; its config.json."""
    special, end, begin, keys = KINDS[kind]
    tokenizer = make_tokenizer(special, end, begin)
    tokenizer.pad_token = keys["special_tokens"]["pad_token"]
    config = {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": kind == "qwen3",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "sliding_window": None,
    }
    if kind != "phi3":  # which has no head_dim of its own
        config["head_dim"] = 24
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_each_architecture_is_counted(kind, tmp_path):
    tiny(tmp_path, kind)
    shape = bases.shape(str(tmp_path))
    recipe = {"lora_r": 3, "lora_target_modules": list(bases.linear_layers(shape)), "peft_use_dora": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert bases.trainable_parameters(recipe, shape) == trained_by_peft(model, recipe)
    assert memory.memory_estimate(KEYS | recipe, shape) > 0


# SmolLM2's own, which its tokenizer brings.
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are SmolLM<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tag", TABLE)
def test_the_served_prompt_is_the_trained_one_and_answers_end(tag, tmp_path):
    """And a plan counts the tokens of that prompt."""
    base = TABLE[tag]
    kind = "qwen3" if tag == "smollm2" else base.config["model_type"]
    special, end, begin, _ = KINDS[kind]
    tokenizer = make_tokenizer(special, end, begin)
    tokenizer.chat_template = SMOLLM2
    tokenizer.save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Sales rose."}, {"role": "assistant", "content": "15.0"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    cfg = configured(tokenizer, rows, **base.recipe.keys)
    prompts.check(cfg, tokenizer, "mine.yaml")
    assert tokenizer.convert_ids_to_tokens(prompts.end_of_turn(tokenizer)) == end
    assert base.recipe.special_tokens["pad_token"] in special
    recipe = KEYS | base.recipe.keys | {"base_model": str(tmp_path), "datasets": [{"path": str(rows)}]}
    counted = estimate.rows_of(tmp_path / "mine.yaml", recipe | {"test_datasets": []}).tokens
    assert counted == [len(tokenizer.apply_chat_template(turns, return_dict=False))]


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "qwen3")) for kind in KINDS])
def test_each_architecture_is_trained_merged_and_served(kind, house, command):
    """By real axolotl; `make merge` compares the merged model's answers with the adapter's."""
    base, out = house / ".cache" / kind, house / "outputs" / f"mine_{kind}"
    shape = tiny(base, kind)
    file = house / "data" / "rows.jsonl"
    asks = [f"Shares of company {n} rose {n}.5 percent." for n in range(120)]
    rows = [[{"role": "user", "content": ask}, {"role": "assistant", "content": ANSWER}] for ask in asks]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    *_, keys = KINDS[kind]
    recipe = KEYS | {"lora_target_modules": ATTENTION} | keys
    recipe |= {"base_model": f".cache/{kind}", "sequence_len": 256, "num_epochs": 3, "learning_rate": 0.02}
    recipe |= {"output_dir": f"outputs/{out.name}", "dataset_prepared_path": f"outputs/{out.name}/tokenised"}
    recipe |= {"datasets": [KEYS["datasets"][0] | {"path": "data/rows.jsonl"}], "evals_per_epoch": None}
    recipe |= {"test_datasets": None, "saves_per_epoch": 1, "fastdora_graphs": False, "eval_sample_packing": False}
    path = house / f"mine_{kind}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    done = command("finlora", "train", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = load_file(out / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == bases.trainable_parameters(recipe, shape)
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert sum(name.endswith("lora_magnitude_vector") for name in tensors) == 2 * len(recipe["lora_target_modules"])
    done = command("finlora", "merge", "--recipe", str(path), "--limit", "0")
    assert done.returncode == 0 and "verified" in done.stdout, done.stderr[-3000:]
    answers_end(out / "merged", base, asks[:6])


def answers_end(merged: Path, base: Path, asks: list[str]) -> None:
    """The merged model ends its answers at the token that its template writes, where the base's go on."""
    from finlora.models.generate import generate
    from finlora.models.load import load_base

    tokenizer = AutoTokenizer.from_pretrained(merged)
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": ask}], add_generation_prompt=True, return_dict=False)
        for ask in asks
    ]
    assert prompts.end_of_turn(tokenizer) == tokenizer.eos_token_id
    answers = generate(load_base(str(merged), 16), tokenizer, asked, 12)
    assert all(answer.ended and answer.text == ANSWER for answer in answers), answers
    assert not all(answer.ended for answer in generate(load_base(str(base), 16), tokenizer, asked, 12))


# What is changed in the table, and of the error: the entry, the key and words.
EDITS = {
    "an unknown key": (
        "  licence: llama3.1\n",
        "  license: llama3.1\n",
        "llama31_8b",
        "license",
        ["did you mean licence"],
    ),
    "a size that is none": ("hidden_size: 4096", "hidden_size: wide", "llama31_8b", "hidden_size", ["no number"]),
    "no learning rate": ("learning_rate: 0.001", "learning_rate: 0", "smollm2", "learning_rate", ["above 0"]),
    "half a checksum": ("sha256: b179", "sha256: b17", "smollm2", "sha256", ["SHA-256", "64"]),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_table_that_was_edited_wrongly(case, tmp_path):
    before, after, entry, key, words = EDITS[case]
    text = bases.TABLE.read_text(encoding="utf-8")
    assert before in text
    path = tmp_path / "bases.yaml"
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    with refuses(*words, file=f"{path}: {entry}", key=key):
        bases.load_bases(path)
