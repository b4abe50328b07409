"""The recipe book: every run of FinLoRA is in it, every key is known and decided by one part of the name."""

import copy
import csv
import random
import re
from pathlib import Path

import pytest
import yaml
from failures import failed, refuses, says
from hypothesis import given
from hypothesis import strategies as st

from fastdora.plugin.keys import RecipeError, check_keys, kept_schema, read_recipe
from finlora.core.errors import UserError
from finlora.data.tasks import load_tasks
from finlora.recipes import bases, factorise
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes.memory import memory_line

ALL = {path.stem: recipes.load(path).keys for path in map(recipe_names.find, recipe_names.names())}
DEMOS = {"demo_r8_dora", "demo_smollm2_bf16_r8_dora"}
TASKS = ["sentiment", "headline", "ner", "finer", "xbrl_term", "xbrl_extract", "formula", "financebench", "cfa"]
MIXTURES = ["general_multi", "reporting_multi", "analysis_multi"]


def test_every_finlora_run_has_its_recipe_with_its_hyperparameters():
    runs = recipe_names.finlora_runs()
    assert len(runs) == 51 and len({run["recipe"] for run in runs}) == 51
    for run in runs:
        recipe = ALL[run["recipe"]]
        bits = 8 if recipe["load_in_8bit"] else 4 if recipe["load_in_4bit"] else 16
        method = "dora" if recipe["peft_use_dora"] else "rslora" if recipe["peft_use_rslora"] else "lora"
        assert (bits, method) == (int(run["quant_bits"]), run["method"]), run["run"]
        for key in ("lora_r", "lora_alpha", "learning_rate", "num_epochs"):
            assert recipe[key] == float(run[key]), (run["run"], key)


def test_the_project_keeps_finlora_facts(shared):
    with (shared.parent / "runs.csv").open(encoding="utf-8", newline="") as file:
        published = list(csv.DictReader(file))
    assert [{k: v for k, v in run.items() if k != "recipe"} for run in recipe_names.finlora_runs()] == published


def test_recipes_beyond_finlora():
    expected = {f"{task}_{kind}_lora" for task in ("sentiment", "headline", "ner") for kind in ("r8", "4bit_r4")}
    expected |= {f"{task}_bf16_r8_{method}" for task in TASKS + MIXTURES for method in ("lora", "dora")}
    kinds = ("r8_lora", "r8_dora", "r8_rslora", "bf16_r8_dora", "4bit_r8_lora")
    small = ("sentiment", "headline", "ner", "xbrl_term", "formula")
    expected |= {f"{task}_smollm2_{kind}" for task in small for kind in kinds}
    assert expected | DEMOS | {run["recipe"] for run in recipe_names.finlora_runs()} == set(ALL)


def test_every_recipe_trains_on_a_known_task():
    for name, recipe in ALL.items():
        task = recipe_names.parse_name(name)["task"]
        assert task == "demo" or task in load_tasks()
        assert recipe["datasets"][0]["path"] == f"data/prepared/{task}/train.jsonl"


def test_every_recipe_states_its_global_batch():
    """About as many samples as FinLoRA's, by the tokens that data/tasks.yaml says a row adds to a pack.

    A mixture has its tasks' mean.
    """
    for name, recipe in ALL.items():
        first = (recipe_names.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        if name in DEMOS:
            assert first.startswith("# Global batch: about ") and " on 1 CPU." in first
            continue
        task = load_tasks()[recipe_names.parse_name(name)["task"]]
        parts = [load_tasks()[part] for part in task.mixture_of] or [task]
        lengths = [part.row_tokens(recipe["fastdora_shared_prefixes"]) for part in parts]
        tokens = recipe["sequence_len"] * recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"]
        samples = tokens / (sum(lengths) / len(lengths))
        line = f"# Global batch: about {samples:.0f} samples ({tokens:,} packed tokens) a step on 1 GPU. FinLoRA: "
        assert first.startswith(line), name
        published = int(first.removeprefix(line).split()[0])
        assert 0.85 * published < samples < 1.15 * published, name


def test_every_recipe_states_the_memory_it_takes():
    """As the estimate has it, which is held against measured runs; on the smallest usual card with 7% to spare."""
    for name in set(ALL) - DEMOS:
        second = (recipe_names.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]
        assert second == memory_line(ALL[name], bases.shape(ALL[name]["base_model"])), name


def test_dora_recipes_keep_axolotls_stale_norm_kernels_off():
    for name, recipe in ALL.items():
        for key in ("lora_qkv_kernel", "lora_mlp_kernel", "lora_o_kernel", "lora_embedding_kernel"):
            assert recipe[key] is False, (name, key)


COMMENTS = {
    name: factorise.comments((recipe_names.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")) for name in ALL
}


def test_factorisation():
    assert list(factorise.factorise(ALL)) == []
    assert list(factorise.factorise(COMMENTS, "comment on key")) == []


def test_every_heading_and_comment_belongs_to_a_key():
    """And none is lost: as many comments are held as a recipe has below its first two lines."""
    for name, of_key in COMMENTS.items():
        text = (recipe_names.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        assert of_key.keys() == ALL[name].keys(), name
        comments = [line for line in text.partition("\n\n")[2].splitlines() if "#" in line]
        assert sum(bool(line) for comment in of_key.values() for line in comment.split("\n")) == len(comments) > 30, (
            name
        )


@given(st.sampled_from(sorted(ALL)), st.sampled_from(["lora_dropout", "adapter", "datasets", "fastdora_layers"]))
def test_a_comment_that_drifts_in_one_recipe_is_named(name, key):
    drifted = COMMENTS | {name: COMMENTS[name] | {key: "another comment"}}
    lines = list(factorise.factorise(drifted, "comment on key"))
    assert any(line.startswith(f"recipes/{name}.yaml: comment on key '{key}' is \"another comment\"") for line in lines)


@given(st.sampled_from(sorted(set(ALL) - DEMOS)), st.randoms(use_true_random=False))
def test_a_key_that_drifts_in_one_recipe_is_named(name: str, rnd: random.Random):
    key = rnd.choice(sorted(ALL[name]))
    drifted = copy.deepcopy(ALL)
    value = drifted[name][key]
    if rnd.random() < 0.3 and value is not None:  # null is what a key that is not there says
        del drifted[name][key]
    elif isinstance(value, bool):
        drifted[name][key] = not value
    elif isinstance(value, int | float):
        drifted[name][key] = value + rnd.choice([-1, 1, 7])
    else:
        drifted[name][key] = [value, "other"]
    lines = list(factorise.factorise(drifted))
    # Where only two recipes share a part of the name, a majority cannot say which of them drifted: both are named.
    assert any(f"key '{key}'" in line for line in lines), lines
    if len([n for n in ALL if _group(n, key) == _group(name, key)]) > 2:
        assert any(line.startswith(f"recipes/{name}.yaml: key '{key}'") for line in lines), lines


def _group(name: str, key: str):
    part = next((part for part, keys in recipe_names.DECIDED_BY.items() if key in keys), None)
    return None if part in (None, "name", "base") else recipe_names.parse_name(name)[part]


@pytest.mark.parametrize("key", ["base_model", "chat_template", "special_tokens", "learning_rate"])
def test_what_a_base_decides_is_held_to_the_table(key):
    """Even where no other recipe has that base."""
    name = "sentiment_qwen3_8b_r8_dora"
    keys = ALL["sentiment_r8_dora"] | bases.load_bases()["qwen3_8b"].recipe.keys
    keys |= recipe_names.decided(recipe_names.parse_name(name), Path("outputs") / name)
    assert list(factorise.factorise(ALL | {name: keys})) == []
    lines = list(factorise.factorise(ALL | {name: keys | {key: ALL["sentiment_r8_dora"][key]}}))
    if ALL["sentiment_r8_dora"][key] == keys[key]:
        assert key == "learning_rate" and not lines
    else:
        (line,) = lines
        says(line, "qwen3_8b in recipes/bases.yaml", file=f"recipes/{name}.yaml", key=key)


def test_a_key_added_to_one_recipe_is_named():
    drifted = copy.deepcopy(ALL)
    drifted["ner_r8_lora"]["adam_beta1"] = 0.8
    says(*factorise.factorise(drifted), "is 0.8", "is null", file="recipes/ner_r8_lora.yaml", key="adam_beta1")


TARGETS = re.compile(r"lora_target_modules:.*\n  - q_proj\n  - k_proj\n  - v_proj")


def added(text: str):
    return lambda recipe: recipe + text


def swapped(old: str | re.Pattern, new: str):
    return lambda recipe: re.sub(old if isinstance(old, re.Pattern) else re.escape(old), new, recipe, count=1)


# What is done to a recipe, the key that is named, and words of the fault and its remedy.
MUTATIONS = {
    "unknown key": (added("lora_dropuot: 0.05\n"), "lora_dropuot", ["unknown", "did you mean 'lora_dropout'"]),
    "unknown key without a near one": (added("zzzzzz: 1\n"), "zzzzzz", ["unknown", "remove"]),
    "unknown nested key": (
        swapped("    field_messages: messages\n", "    field_mesages: messages\n"),
        "datasets.0.field_mesages",
        ["unknown", "did you mean 'field_messages'"],
    ),
    "duplicate key": (added("lora_r: 8\n"), "lora_r", [1, "twice", "keep one"]),
    "wrong type": (swapped("lora_r: 8", "lora_r: eight"), "lora_r", ["'eight'", "integer"]),
    "rank without the name": (
        swapped("lora_r: 8", "lora_r: 16"),
        "lora_r",
        ["is 16", "name says 8", "change", "make new RECIPE=sentiment_r16_dora"],
    ),
    "method without the name": (
        swapped("peft_use_dora: true", "peft_use_dora: false"),
        "peft_use_dora",
        ["is False", "name says True", "change"],
    ),
    "no adapter": (swapped(re.compile("\nadapter: lora .*"), ""), "adapter", ["is None", "name says lora", "change"]),
    "4-bit without qlora": (
        swapped(
            re.compile("load_in_8bit: true (.*)\nload_in_4bit: false"), r"load_in_8bit: false \1\nload_in_4bit: true"
        ),
        "load_in_8bit",
        ["is False", "name says True", "change"],
    ),
    "no size": (swapped("sequence_len: 2560", "sequence_len: 0"), "sequence_len", ["is 0", "above 0"]),
    "every linear layer by a key of its own": (
        added("lora_target_linear: true\n"),
        "lora_target_modules",
        ["lora_target_linear", "keep one"],
    ),
    "a target twice": (swapped("  - k_proj\n", "  - q_proj\n"), "lora_target_modules", ["q_proj", "twice", "keep one"]),
    "a target that is no layer": (
        swapped("  - k_proj\n", "  - k_prj\n"),
        "lora_target_modules",
        ["k_prj", "none of", "k_proj", "down_proj"],
    ),
    "targets that are a word": (
        swapped(TARGETS, "lora_target_modules: all-linear"),
        "lora_target_modules",
        ["all-linear", "write a list", "lora_target_linear: true"],
    ),
    "no targets": (swapped(TARGETS, "lora_target_modules: []"), "lora_target_modules", ["[]", "write a list"]),
    "an optimizer that nobody has": (
        swapped("optimizer: adamw_torch_fused", "optimizer: adamw_torch_fusd"),
        "optimizer",
        ["'adamw_torch_fusd'", "did you mean 'adamw_torch_fused'"],
    ),
    "a scheduler that nobody has": (
        swapped("lr_scheduler: cosine", "lr_scheduler: sawtooth"),
        "lr_scheduler",
        ["'sawtooth'", "not one of", "'cosine'", "'rex'"],
    ),
    "a mistyped key of a rate group": (
        added("lr_groups: [{nam: m, modules: [q_proj], lr: 1.0}]\n"),
        "lr_groups.0.nam",
        ["unknown", "did you mean 'name'"],
    ),
    "a rate for nothing": (
        added("lr_groups: [{name: m, modules: [layers.3.self_attn.q_proj, magnitude_vektor], lr: 1.0}]\n"),
        "lr_groups",
        ["magnitude_vektor", "nothing that is trained", "q_proj", "lora_A", "lora_magnitude_vector"],
    ),
    "without the plugin": (
        swapped("  - fastdora.FastDoraPlugin\n", ""),
        "plugins",
        ["add fastdora.FastDoraPlugin"],
    ),
    "not YAML": (added("lora_r: [8\n"), None, [2, "not valid YAML", "fix that line"]),
    "a list": (lambda recipe: "- lora_r: 8\n", None, ["is not a mapping", "keys"]),
    "empty": (lambda recipe: "", None, ["is empty", "mapping"]),
    "a tag that runs code": (
        added("hub_model_id: !!python/object/apply:os.system [ls]\n"),
        None,
        [1, "not valid YAML", "os.system", "fix that line"],
    ),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_mutated_recipe_is_refused_with_its_key_and_remedy(case, tmp_path):
    """A number before the words: so many lines below the recipe's own."""
    mutate, key, words = MUTATIONS[case]
    text = (recipe_names.RECIPES / "sentiment_r8_dora.yaml").read_text(encoding="utf-8")
    path = tmp_path / "sentiment_r8_dora.yaml"
    path.write_text(mutate(text), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    below = words[0] if isinstance(words[0], int) else None
    line = None if below is None else len(text.splitlines()) + below
    with refuses(*words[below is not None :], file=path, line=line, key=key):
        recipes.load(path)


def test_a_recipe_that_is_not_utf8(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("# \xfc\n".encode("latin-1"))
    with refuses("UTF-8", "byte 2", "save it", file=path):
        recipes.load(path)


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("sentiment_r8_dora", "sentiment_r8_dora"),
        ("sentiment_llama_3_1_8b_8bits_r8_dora", "sentiment_r8_dora"),
        ("finer_llama_3_1_8b_4bits_r4", "finer_4bit_r4_lora"),
        ("xbrl_extract_llama_3_1_8b_8bits_r8_dora_a32", "xbrl_extract_r8_a32_dora"),
    ],
)
def test_find(name, recipe):
    assert recipe_names.find(name).stem == recipe


def test_find_by_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1\n", encoding="utf-8")
    assert recipe_names.find(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("sentment_r8_dora", "did you mean sentiment_r8_dora"),
        ("sentiment_llama_3_1_8b_8bit_r8_dora", "did you mean sentiment_llama_3_1_8b_8bits_r8_dora"),
        ("", "`make recipes`"),
        ("bases", "`make recipes`"),
        ("../../etc/passwd", "`make recipes`"),
        ("sentiment_qwen3_4b_r8_rslora", "make new RECIPE=sentiment_qwen3_4b_r8_rslora"),
        ("sentiment_r16_qwen3_4b_dora", "sentiment_qwen3_4b_r16_dora"),
        ("dora_r4_smollm2_xbrl_term_bf16", "xbrl_term_smollm2_bf16_r4_dora"),
        ("sentiment_8bit_r4_a16_dora", "default: sentiment_r4_dora"),
        ("sentiment_llama31_8b_r8_lora", "default: sentiment_r8_lora"),
        ("headline_qwen3_7b_r8_dora", "did you mean qwen3_8b"),
        ("headline_gpt2_r8_dora", "gpt2 is no base model"),
        ("headlin_mistral_7b_r8_dora", "did you mean headline_mistral_7b_r8_dora"),
        ("headline_qwen3_8b_dora", "a name is <task>"),
    ],
)
def test_a_mistyped_recipe_names_the_nearest(name, hint):
    with refuses("no such recipe", hint, file=f"RECIPE={name}"):
        recipe_names.find(name)


@given(st.text(max_size=60))
def test_any_name_is_found_or_refused_in_one_line(name):
    try:
        assert recipe_names.find(name).is_file()
    except UserError as error:
        assert str(error).startswith("RECIPE=")


def test_list_and_filter(command):
    shown = command("finlora", "recipes").stdout.splitlines()
    assert len(shown) == len(ALL) + 1
    filtered = command("finlora", "recipes", "--task", "sentiment").stdout.splitlines()
    assert len(filtered) == 13 and all("sentiment" in line for line in filtered[1:])
    assert any(
        line.split() == "sentiment_r8_dora sentiment llama31_8b 8 8 16 dora 4,915,200".split() for line in filtered
    )
    typo = command("finlora", "recipes", "--task", "sentimnt")
    failed(typo, "no such task", "did you mean sentiment", file="TASK=sentimnt")


def test_check_command_names_what_drifted(command, house):
    assert command("finlora", "check").returncode == 0
    path = house / "recipes" / "headline_r8_lora.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("warmup_steps: 10", "warmup_steps: 11"), encoding="utf-8")
    done = command("finlora", "check")
    failed(done, "is 11", "is 10", file="recipes/headline_r8_lora.yaml", key="warmup_steps")


def test_recipes_are_plain_yaml():
    for name, recipe in ALL.items():
        assert yaml.safe_load((recipe_names.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")) == recipe


def test_a_path_that_is_not_there_is_no_recipe_of_its_last_name(tmp_path):
    for path in (tmp_path / "sentiment_r8_dora.yaml", tmp_path / "mine.yml", "./sentiment_r8_dora.yaml"):
        with refuses("no such file", "give", file=f"RECIPE={path}"):
            recipe_names.find(str(path))
    assert recipe_names.find("sentiment_r8_dora.yaml") == recipe_names.RECIPES / "sentiment_r8_dora.yaml"


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "gpt2"}', '{"hidden_size": "x"}'])
def test_a_base_model_of_another_kind_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with refuses("hidden_size", "take a model of Llama's kind", file=tmp_path / "config.json"):
        bases.shape(str(tmp_path))


def test_a_key_that_is_missing_is_named():
    recipe = read_recipe(recipe_names.RECIPES / "sentiment_r8_dora.yaml")
    for key in ("base_model", "learning_rate"):
        rest = {name: value for name, value in recipe.items() if name != key}
        with refuses("missing", "add", error=RecipeError, file="r.yaml", key=key):
            check_keys(rest, "r.yaml", kept_schema(recipe["plugins"], recipes.CACHE))
