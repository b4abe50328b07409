"""What `make train` refuses before anything is loaded: one line that names the recipe, the key and the remedy."""

import hashlib
import json
import shlex
from pathlib import Path

import pytest
import yaml
from failures import failed, refuses

from fastdora.plugin.keys import kept_schema
from finlora.core.errors import UserError
from finlora.recipes import bases, rules
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.train import distributed, launch, preflight
from finlora.train.distributed import Launch
from finlora.train.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
DORA = yaml.safe_load((recipe_names.RECIPES / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))
ROWS = DORA["datasets"][0]


def written(folder: Path, **changes) -> Path:
    """A recipe whose name says nothing, with these keys changed (None: without)."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (DORA | changes).items() if value is not None}))
    return path


# The keys that are changed, the key that is named, and words of fault and remedy.
KEYS = {
    **{f"preference tuning, {rl}": ({"rl": rl}, "rl", ["supervised", "remove"]) for rl in ("dpo", "orpo", "kto")},
    "a reward model": ({"reward_model": True}, "reward_model", ["supervised", "remove"]),
    "text without turns": ({"pretraining_dataset": [{"path": "a"}]}, "pretraining_dataset", ["make data FILE="]),
    "a split of the rows": ({"val_set_size": 0.1}, "val_set_size", ["test_datasets", "make data FILE="]),
    "the split beside validation rows": (
        {"val_set_size": 0.1, "test_datasets": None},
        "val_set_size",
        ["test_datasets", "make data FILE="],
    ),
    "fewer rows": (
        {"dataset_exact_deduplication": True},
        "dataset_exact_deduplication",
        ["every row", "take rows out"],
    ),
    "an upload": ({"hub_model_id": "me/model"}, "hub_model_id", ["make publish"]),
    "rows for the hub": ({"push_dataset_to_hub": "me/rows"}, "push_dataset_to_hub", ["make publish"]),
    "all linear layers, and some": ({"lora_target_linear": True}, "lora_target_modules", ["lora_target_linear", "one"]),
    "a rank of no layer": ({"lora_rank_pattern": {"o_proj": 4}}, "lora_rank_pattern", ["o_proj", "take one of q_proj"]),
    "an alpha of a layer too many": (
        {"lora_alpha_pattern": {r"layers\.32\.self_attn\.q_proj": 4}},
        "lora_alpha_pattern",
        [r"layers\.32\.", "model.layers.0.self_attn.q_proj"],
    ),
    "no regular expression": ({"lora_rank_pattern": {"(q_proj": 4}}, "lora_rank_pattern", ["(q_proj", "fix"]),
    "a rank of 0": ({"lora_rank_pattern": {"q_proj": 0}}, "lora_rank_pattern.q_proj", ["0"]),
    "LoftQ": ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "peft", ["merging cannot undo", "remove"]),
    "no initial weights": ({"peft_init_lora_weights": False}, "peft_init_lora_weights", ["ignores", "remove"]),
    "PiSSA": ({"peft_init_lora_weights": "pissa_niter_4"}, "peft_init_lora_weights", ["merging cannot undo", "remove"]),
    "ReLoRA": ({"relora": True}, "relora", ["merging cannot undo", "remove"]),
    "trained embeddings": (
        {"peft_trainable_token_indices": [5]},
        "peft_trainable_token_indices",
        ["merging", "remove"],
    ),
    "trained base weights": ({"unfrozen_parameters": ["norm"]}, "unfrozen_parameters", ["merging", "remove"]),
    "another configuration": (
        {"model_config": {"rope_theta": 1}},
        "model_config",
        ["as it is published", "remove"],
    ),
    "a random base": ({"reinit_weights": True}, "reinit_weights", ["as it is published", "remove"]),
    "an old base": ({"model_revision": "v1"}, "model_revision", ["latest", "base_model"]),
    "another NF4": (
        {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
        "bnb_config_kwargs",
        ["load_in_4bit", "remove"],
    ),
    "new tokens": ({"tokens": ["<a>"]}, "tokens", ["embeddings", "remove"]),
    "another tokenizer": ({"tokenizer_config": "a/b"}, "tokenizer_config", ["tokenizer", "remove"]),
    "a tokenizer's class": ({"tokenizer_type": "LlamaTokenizer"}, "tokenizer_type", ["own tokenizer", "remove"]),
    "rows over GPUs": ({"context_parallel_size": 2}, "context_parallel_size", ["is 2", "whole rows", "remove it"]),
    "rows over GPUs, as it was": ({"sequence_parallel_degree": 4}, "sequence_parallel_degree", ["whole rows"]),
    "a system message": ({"default_system_message": "Be brief."}, "default_system_message", ["template"]),
    "a template that is not read": ({"chat_template_jinja": "{{ x }}"}, "chat_template_jinja", ["llama3", "jinja"]),
    "rows of instructions": (
        {"datasets": [ROWS | {"type": "alpaca"}]},
        "datasets.0.type",
        ["alpaca", "make data FILE=", "chat_template"],
    ),
    "rows of a user's format": (
        {"test_datasets": [ROWS | {"type": {"field_instruction": "a", "format": "{instruction}"}}]},
        "test_datasets.0.type",
        ["make data FILE=", "chat_template"],
    ),
    "tables": ({"datasets": [ROWS | {"ds_type": "csv"}]}, "datasets.0.ds_type", ["JSON", "make data FILE="]),
    "a tenth of a file": ({"datasets": [ROWS | {"split": "train[:10%]"}]}, "datasets.0.split", ["every row"]),
    "a shard": ({"datasets": [ROWS, ROWS | {"shards": 4}]}, "datasets.1.shards", ["every row"]),
    "4 bits that are not": (
        {"load_in_8bit": False, "load_in_4bit": True, "adapter": "lora"},
        "adapter",
        ["set qlora", "load_in_4bit"],
    ),
    "qlora of 8 bits": ({"adapter": "qlora"}, "adapter", ["set lora", "load_in_4bit"]),
    "8 bits and 4": ({"load_in_4bit": True, "adapter": "qlora"}, "load_in_4bit", ["load_in_8bit", "keep one"]),
    "all of it dropped": ({"lora_dropout": 1.0}, "lora_dropout", ["is 1.0", "below 1"]),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", ["is 0", "above 0"]),
    "DoRA on axolotl's kernels": ({"lora_qkv_kernel": True}, "lora_qkv_kernel", ["stale norm", "set it to false"]),
    "kernels that switch themselves on": ({"lora_o_kernel": None}, "lora_o_kernel", ["stale norm", "set it to false"]),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_that_would_make_another_model_is_refused_with_its_remedy(case, tmp_path):
    changes, key, words = KEYS[case]
    path = written(tmp_path, **changes)
    with refuses(*words, file=path, key=key):
        recipes.load(path)


REFUSED = [(kind, entry) for kind, entries in rules.REFUSED.items() for entry in entries]


def test_the_page_on_refusals_lists_the_keys_as_the_errors_do():
    text = (ROOT / "docs" / "refused.md").read_text(encoding="utf-8")
    rows = text.partition("## Keys")[2].partition("\n## ")[0].partition("| --- | --- | --- |\n")[2]
    expected = []
    for _, entry in REFUSED:
        keys = ", ".join(f"`{key}`" for key in entry["keys"])
        if values := entry.get("unless"):
            keys += " other than " + ", ".join(
                f"`{str(value).lower() if value is True else value}`" for value in values
            )
        expected.append(f"| {keys} | {entry['why']} | {entry['instead']} |")
    assert rows.splitlines() == expected


def test_keys_that_change_nothing_are_no_trouble(tmp_path):
    same = {"base_model_config": DORA["base_model"], "tokenizer_type": "AutoTokenizer", "val_set_size": 0, "rl": None}
    same |= {"context_parallel_size": 1}
    assert recipes.load(written(tmp_path, **same)).keys["val_set_size"] == 0


def test_what_is_refused_is_what_axolotl_would_obey():
    """A key that its schema does not have is unknown, and needs no line in the table."""
    schema = kept_schema(DORA["plugins"], recipes.CACHE)
    known = {"recipe": schema["properties"], "rows": schema["$defs"]["SFTDataset"]["properties"]}
    assert [key for kind, entry in REFUSED for key in entry["keys"] if key not in known[kind]] == []


def test_axolotls_options_are_no_way_round(tmp_path):
    with refuses("supervised", "remove", file="ARGS=--rl dpo", key="rl"):
        recipes.load(written(tmp_path), ["--rl", "dpo"])


@pytest.mark.parametrize(
    "args, words",
    [
        (["--base-model", "other/model"], ["base_model", "copy mine.yaml"]),
        (["--base-model=other/model"], ["base_model", "copy mine.yaml"]),
        (["--datasets", "rows.jsonl"], ["datasets", "copy mine.yaml"]),
        (["--learning-rte", "0.1"], ["--learning-rte", "did you mean --learning-rate"]),
        (["--fastdora-layers", "peft"], ["--fastdora-layers", "recipe"]),
    ],
)
def test_options_that_axolotl_would_not_take_or_the_record_not_know(args, words):
    with refuses(*words, file=f"ARGS={' '.join(args)}"):
        recipes.check_options(Path("mine.yaml"), args)
    taken = ["--learning-rate=0.1", "--no-sample-packing", "--max-steps", "3", "--debug"]
    recipes.check_options(Path("mine.yaml"), taken)


@pytest.mark.parametrize(
    "args, key, words",
    [
        (["--sequence-len", "99999"], "sequence_len", ["8192 positions"]),
        (["--lora-dropout", "1"], "lora_dropout", ["below 1"]),
        (["--lora-target-modules", "[q_proj]"], "lora_target_modules", ["list"]),  # axolotl takes it for text
        (["--lora-modules-to-save", "[lm_head]"], "lora_modules_to_save", ["array"]),
        (["--lora-model-dir", "outputs/nope"], "lora_model_dir", ["outputs/nope", "adapter's folder"]),
        (["--special-tokens.pad-token", "<|pad|>"], "special_tokens.pad_token", ["<|pad|>", "take one"]),
        (["--chat-template-jinja", "typo.jinja"], "chat_template_jinja", ["chat_template"]),
        (["--seed", "x"], "seed", ["integer"]),
    ],
)
def test_options_pass_the_checks_of_the_keys_that_they_set(args, key, words, checked, tmp_path):
    def check(options: list[str], **changes) -> None:
        def load_and_check(recipe: recipes.Recipe) -> None:
            preflight.check_base(recipes.load(written(tmp_path, **recipe.keys), options))

        checked({}, load_and_check, **changes)

    with refuses(*words, file=f"ARGS={shlex.join(args)}", key=key):
        check(args, sample_packing=False, fastdora_shared_prefixes=False, sequence_len=512)
    check(["--learning-rate", "1e-3", "--sequence-len", "4096", "--debug", "--no-eval-sample-packing"])
    check(["--special-tokens.pad-token", "<|eot_id|>", "--no-eval-sample-packing"])


@pytest.mark.parametrize(
    "copy, file", [("{}: key 'chat_template': qwen3", "own/mine.yaml"), ("axolotl {}: killed", "")]
)
def test_errors_of_the_plugin_name_the_recipe_and_not_its_copy(copy, file, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "outputs" / "mine")
    message = copy.format(folder.recipe_file)

    def fail(*args) -> None:
        raise UserError(message)

    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "axolotl", fail)
    with refuses(file=file or message.partition(":")[0], **{"key": "chat_template"} if file else {}):
        launch.preprocess_and_train(recipes.Recipe(Path("own/mine.yaml"), DORA), folder, [], True, None)


def test_paths_that_would_be_read_or_written_wrongly(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "broken.json").write_text("{broken")
    (tmp_path / "outputs" / "link").symlink_to(tmp_path / "elsewhere")
    for changes, key, words in (
        ({"output_dir": "outputs/link"}, "output_dir", ["outputs/link is a link", "remove"]),
        ({"output_dir": "outputs/link/deeper"}, "output_dir", ["outputs/link is a link", "remove"]),
        ({"output_dir": "outputs"}, "output_dir", ["name a folder"]),
        ({"output_dir": "outputs/x/.."}, "output_dir", ["name a folder"]),
        ({"deepspeed": "zero9.json"}, "deepspeed", ["zero9.json", "no file", "fix"]),
        ({"datasets": [ROWS | {"path": "org/rows"}]}, "datasets", ["org/rows", "no file", "make data FILE="]),
        ({"chat_template_jinja": "prompts/typo.jinja"}, "chat_template_jinja", ["typo.jinja", "no file", "fix"]),
        (
            {"datasets": [ROWS | {"chat_template_jinja": "typo.jinja"}]},
            "datasets.chat_template_jinja",
            ["typo.jinja", "no file"],
        ),
    ):
        with refuses(*words, file="mine.yaml", key=key):
            rules.check_paths(recipes.Recipe(Path("mine.yaml"), DORA | changes))
    rules.check_paths(recipes.Recipe(Path("mine.yaml"), DORA | {"chat_template_jinja": "{{ messages }}"}))
    monkeypatch.setattr(distributed, "ROOT", tmp_path)
    with refuses("broken.json", "no JSON object", "fix", file="mine.yaml", key="deepspeed"):
        distributed.distribute(recipes.Recipe(Path("mine.yaml"), DORA | {"deepspeed": "broken.json"}), Launch())


TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 8192,
}
ADAPTER = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "use_dora": True,
    "use_rslora": False,
    "target_modules": ["v_proj", "k_proj", "q_proj"],
}


@pytest.fixture
def checked(tmp_path):
    """check_base on a recipe with changes, whose base model has a configuration with changes and a small tokenizer."""
    from tokenizers import Tokenizer, models

    def check_with(config: dict, check=preflight.check_base, **changes) -> None:
        base = tmp_path / "base"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps(LLAMA | config), encoding="utf-8")
        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(290)}, unk_token="w0"))
        tokenizer.add_special_tokens(TOKENS)
        tokenizer.save(str(base / "tokenizer.json"))
        check(recipes.Recipe(Path("mine.yaml"), DORA | {"base_model": str(base)} | changes))

    return check_with


BASES = {
    "a pad token that is not there": (
        {},
        {"special_tokens": {"pad_token": "<|finetune_right_pad|>"}},
        "special_tokens.pad_token",
        ["<|finetune_right_pad|>", "take one that is, <|finetune_right_pad_id|>"],
    ),
    "no such token, and none near": (
        {},
        {"special_tokens": {"additional_special_tokens": ["[X]"]}},
        "special_tokens.additional_special_tokens",
        ["[X]", "take one", "<|eot_id|>"],
    ),
    "an end of turn that is not there": (
        {},
        {"eot_tokens": ["<|eot|>"]},
        "eot_tokens",
        ["take one that is, <|eot_id|>"],
    ),
    "more tokens than embeddings": ({"vocab_size": 200}, {}, "base_model", ["293", "200", "take a model"]),
    "tied embeddings": (
        {"tie_word_embeddings": True},
        {"lora_modules_to_save": ["lm_head"]},
        "lora_modules_to_save",
        ["ties", "remove"],
    ),
    "tied embeddings by their whole name": (
        {"tie_word_embeddings": True},
        {"lora_modules_to_save": ["model.embed_tokens"]},
        "lora_modules_to_save",
        ["ties", "remove"],
    ),
    "tied embeddings by the end of their name": (
        {"tie_word_embeddings": True},
        {"lora_modules_to_save": ["tokens"]},
        "lora_modules_to_save",
        ["model.embed_tokens", "ties", "remove"],
    ),
    "a module to save that is not there": (
        {},
        {"lora_modules_to_save": ["lm_haed"]},
        "lora_modules_to_save",
        ["lm_haed", "take one that is, lm_head"],
    ),
    "a quantized base": ({"quantization_config": {"quant_method": "gptq"}}, {}, "base_model", ["quantized", "16-bit"]),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        {},
        "base_model",
        ["LlamaForSequenceClassification", "take a model"],
    ),
    "rows longer than the positions": (
        {"max_position_embeddings": 2048},
        {"sample_packing": False, "fastdora_shared_prefixes": False},
        "sequence_len",
        [f"is {DORA['sequence_len']}", "2048 positions", "set it"],
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_model_that_does_not_fit_is_named(case, checked):
    config, changes, key, words = BASES[case]
    with refuses(*words, file="mine.yaml", key=key):
        checked(config, **changes)


def test_a_base_model_that_fits(checked):
    checked({})
    checked({"max_position_embeddings": 2048})  # packed: each row has positions of its own
    checked({}, lora_modules_to_save=["lm_head", "model.embed_tokens"])
    checked({"tie_word_embeddings": True}, lora_modules_to_save=["input_layernorm"], eot_tokens=["<|eot_id|>"])
    checked({}, added_tokens_overrides={291: "<|end|>"}, eot_tokens=["<|end|>"])  # a reserved token gets another name


def test_layers_that_an_architecture_does_not_have(checked):
    """Phi-3 has a Llama's sizes, and joins q, k and v in one layer."""
    phi = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
    with refuses("q_proj is none of", "qkv_proj, o_proj, gate_up_proj, down_proj", file="mine.yaml") as error:
        checked(phi)
    assert "'lora_target_modules'" in str(error.value)
    for check in preflight.check_base, rules.check_values:
        checked(phi, check, lora_target_modules=["qkv_proj", "o_proj"])
    with refuses("transformers knows", "take another", file="mine.yaml", key="base_model"):
        checked({"model_type": "perceptron"})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"modules_to_save": None, "alpha_pattern": {}},
        {"r": 4},
        {"lora_dropout": 0},
        {"target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"q_proj": 4}},
        None,
    ],
)
def test_an_adapter_to_start_from_that_is_not_what_the_recipe_says(change, checked, tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    if change is not None:
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | change), encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(b"")
    if change is not None and not any(change.values()) and "lora_dropout" not in change:
        checked({}, lora_model_dir=str(folder))
        return
    words = ["name an adapter's folder"] if change is None else [*change, *map(str, change.values()), "make them equal"]
    with refuses(str(folder), *words, file="mine.yaml", key="lora_model_dir"):
        checked({}, lora_model_dir=str(folder))


def test_an_adapter_to_start_from_of_another_base(checked, tmp_path, monkeypatch):
    """Bases of equal shapes: PEFT loads the adapter on any of them."""
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    base, first, other = tmp_path / "base", tmp_path / "first", tmp_path / "other"
    for folder in (base, first, other):
        folder.mkdir()
    (base / "model.safetensors").write_bytes(b"base")
    (other / "model.safetensors").write_bytes(b"other")
    (first / "adapter_model.safetensors").write_bytes(b"")

    def trained_on(named: str, digest: str | None = None) -> None:
        (first / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": named}))
        start = {named: {"model.safetensors": digest}} if digest else {}
        (first / "run.json").write_text(json.dumps({"start": start}))
        checked({}, lora_model_dir=str(first))

    same = hashlib.sha256(b"base").hexdigest()
    trained_on("base")
    trained_on(str(base), same)
    trained_on("gone", same)  # the same weights by another name
    for named, digest, words in (
        ("other", None, ["model.safetensors differ"]),
        ("gone", None, []),
        ("org/model", None, []),
        ("base", "0" * 64, ["model.safetensors differ"]),  # replaced since
    ):
        with refuses(f"trained on {named}", *words, "set base_model", file="mine.yaml", key="lora_model_dir"):
            trained_on(named, digest)


def test_a_first_adapter_in_the_runs_own_folder_is_refused(checked):
    """FORCE=1 would set it aside before training starts from it."""
    with refuses("own folder", "EPOCHS=", "another name", file="mine.yaml", key="lora_model_dir"):
        checked({}, lora_model_dir=str(ROOT / "outputs" / "own" / "checkpoint-4"), output_dir="outputs/own")


@pytest.mark.parametrize("name", ["./models/lama", "/models/lama", "models/a/b"])
def test_a_mistyped_path_of_the_base_is_called_one(name):
    with refuses(name, "no folder here", "fix the name", file="mine.yaml", key="base_model"):
        bases.fetch_base(Path("mine.yaml"), {"base_model": name})


def test_a_base_without_configuration(tmp_path):
    (tmp_path / "base").mkdir()
    with refuses("config.json", "name a model's folder", file="mine.yaml", key="base_model"):
        preflight.check_base(recipes.Recipe(Path("mine.yaml"), DORA | {"base_model": str(tmp_path / "base")}))


def test_make_train_refuses_before_it_makes_a_folder(command, house):
    path = house / "recipes" / "ner_r8_dora.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("pad_token: <|finetune_right_pad_id|>", "pad_token: <|pad|>"), encoding="utf-8")
    done = command("finlora", "train", "ner_r8_dora", "--tiny")
    failed(done, "<|pad|>", "no token of", "take one", file=path, key="special_tokens.pad_token")
    assert [path.name for path in (house / "outputs" / "tiny").iterdir()] == [".ner_r8_dora.lock"]
