"""The recipe book: every run of FinLoRA is in it, every key is known and decided by one part of the name."""

import copy
import csv
import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data.tasks import load_tasks
from fastdora.keys import RecipeError, check_keys, read_recipe
from tools import recipes
from tools.checks import memory_estimate
from tools.cli import UserError

ALL = {path.stem: recipes.load(path) for path in sorted(recipes.RECIPES.glob("*.yaml"))}
TASKS = ["sentiment", "headline", "ner", "finer", "xbrl_term", "xbrl_extract", "formula", "financebench", "cfa"]
MIXTURES = ["general_multi", "reporting_multi", "analysis_multi"]


def test_every_finlora_run_has_its_recipe_with_its_hyperparameters():
    runs = recipes.finlora_runs()
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
    assert [{k: v for k, v in run.items() if k != "recipe"} for run in recipes.finlora_runs()] == published


def test_recipes_beyond_finlora():
    expected = {f"{task}_{kind}_lora" for task in ("sentiment", "headline", "ner") for kind in ("r8", "4bit_r4")}
    expected |= {f"{task}_bf16_r8_{method}" for task in TASKS + MIXTURES for method in ("lora", "dora")}
    assert expected | {"demo_r8_dora"} | {run["recipe"] for run in recipes.finlora_runs()} == set(ALL)


def test_every_recipe_trains_on_a_known_task():
    for name, recipe in ALL.items():
        task = recipes.parse_name(name)["task"]
        assert task == "demo" or task in load_tasks()
        assert recipe["datasets"][0]["path"] == f"data/prepared/{task}/train.jsonl"


def test_every_recipe_states_its_global_batch():
    for name in ALL:
        first = (recipes.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# Global batch: about ") and (" on 1 GPU." in first or " on 1 CPU." in first), name


def test_every_recipe_states_the_memory_it_takes():
    """As the estimate has it, which is held against measured runs; on the smallest usual card with 7% to spare."""
    shape = recipes.shape("meta-llama/Llama-3.1-8B-Instruct")
    for name in set(ALL) - {"demo_r8_dora"}:
        second = (recipes.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]
        needs = [memory_estimate(ALL[name] | changes, shape) for changes in ({}, {"gradient_checkpointing": True})]
        (most, large), (least, small) = (
            (round(need), next(card for card in (16, 24, 40, 48, 80) if need <= card * 0.93)) for need in needs
        )
        assert second == (
            f"# Memory: about {most} GiB (a GPU of {large} GB), {least} with gradient_checkpointing: true ({small} GB)."
        ), name


def test_dora_recipes_keep_axolotls_stale_norm_kernels_off():
    for name, recipe in ALL.items():
        for key in ("lora_qkv_kernel", "lora_mlp_kernel", "lora_o_kernel", "lora_embedding_kernel"):
            assert recipe[key] is False, (name, key)


def test_factorisation():
    assert list(recipes.factorise(ALL)) == []


@given(st.sampled_from(sorted(set(ALL) - {"demo_r8_dora"})), st.randoms(use_true_random=False))
def test_a_key_that_drifts_in_one_recipe_is_named(name: str, rnd: random.Random):
    key = rnd.choice(sorted(ALL[name]))
    drifted = copy.deepcopy(ALL)
    value = drifted[name][key]
    if rnd.random() < 0.3:
        del drifted[name][key]
    elif isinstance(value, bool):
        drifted[name][key] = not value
    elif isinstance(value, int | float):
        drifted[name][key] = value + rnd.choice([-1, 1, 7])
    else:
        drifted[name][key] = [value, "other"]
    lines = list(recipes.factorise(drifted))
    # Where only two recipes share a part of the name, a majority cannot say which of them drifted: both are named.
    assert any(f"key '{key}'" in line for line in lines), lines
    if len([n for n in ALL if _group(n, key) == _group(name, key)]) > 2:
        assert any(line.startswith(f"recipes/{name}.yaml: key '{key}'") for line in lines), lines


def _group(name: str, key: str):
    part = next((part for part, keys in recipes.DECIDED_BY.items() if key in keys), None)
    return None if part in (None, "name") else recipes.parse_name(name)[part]


def test_a_key_added_to_one_recipe_is_named():
    drifted = copy.deepcopy(ALL)
    drifted["ner_r8_lora"]["adam_beta1"] = 0.8
    assert list(recipes.factorise(drifted)) == [
        "recipes/ner_r8_lora.yaml: key 'adam_beta1' is 0.8, in the other recipes it is null"
    ]


TARGETS = "lora_target_modules: "
MUTATIONS = {
    "unknown key": (
        lambda text: text + "lora_dropuot: 0.05\n",
        "{path}: unknown key 'lora_dropuot'; did you mean 'lora_dropout'?",
    ),
    "unknown key without a near one": (
        lambda text: text + "zzzzzz: 1\n",
        "{path}: unknown key 'zzzzzz'; remove it",
    ),
    "unknown nested key": (
        lambda text: text.replace("    field_messages: messages\n", "    field_mesages: messages\n", 1),
        "{path}: unknown key 'datasets.0.field_mesages'; did you mean 'field_messages'?",
    ),
    "duplicate key": (
        lambda text: text + "lora_r: 8\n",
        "{path}: line {after}: key 'lora_r' stands twice; keep one",
    ),
    "wrong type": (
        lambda text: text.replace("lora_r: 8", "lora_r: eight"),
        "{path}: key 'lora_r' is 'eight'; it must be integer",
    ),
    "rank without the name": (
        lambda text: text.replace("lora_r: 8", "lora_r: 16"),
        "{path}: key 'lora_r' is 16, but the name says 8; change one of them",
    ),
    "method without the name": (
        lambda text: text.replace("peft_use_dora: true", "peft_use_dora: false"),
        "{path}: key 'peft_use_dora' is False, but the name says True; change one of them",
    ),
    "no adapter": (
        lambda text: text.replace("adapter: lora\n", ""),
        "{path}: key 'adapter' is None, but the name says lora; change one of them",
    ),
    "4-bit without qlora": (
        lambda text: text.replace("load_in_8bit: true", "load_in_8bit: false").replace(
            "load_in_4bit: false", "load_in_4bit: true"
        ),
        "{path}: key 'load_in_8bit' is False, but the name says True; change one of them",
    ),
    "no size": (
        lambda text: text.replace("sequence_len: 5120", "sequence_len: 0"),
        "{path}: key 'sequence_len' is 0; give it a value above 0",
    ),
    "every linear layer by a key of its own": (
        lambda text: text + "lora_target_linear: true\n",
        "{path}: key 'lora_target_linear': list the modules in lora_target_modules and remove it",
    ),
    "a target twice": (
        lambda text: text.replace("  - k_proj\n", "  - q_proj\n"),
        "{path}: key 'lora_target_modules': q_proj stands twice; keep one",
    ),
    "a target that is no layer": (
        lambda text: text.replace("  - k_proj\n", "  - k_prj\n"),
        "{path}: key 'lora_target_modules': k_prj is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj",
    ),
    "targets that are a word": (
        lambda text: text.replace("lora_target_modules:\n  - q_proj\n  - k_proj\n  - v_proj", TARGETS + "all-linear"),
        "{path}: key 'lora_target_modules' is \"all-linear\"; write a list, as in [q_proj, v_proj]",
    ),
    "no targets": (
        lambda text: text.replace("lora_target_modules:\n  - q_proj\n  - k_proj\n  - v_proj", TARGETS + "[]"),
        "{path}: key 'lora_target_modules' is []; write a list, as in [q_proj, v_proj]",
    ),
    "an optimizer that nobody has": (
        lambda text: text.replace("optimizer: adamw_torch_fused", "optimizer: adamw_torch_fusd"),
        "{path}: key 'optimizer' is 'adamw_torch_fusd'; did you mean 'adamw_torch_fused'?",
    ),
    "a scheduler that nobody has": (
        lambda text: text.replace("lr_scheduler: cosine", "lr_scheduler: sawtooth"),
        "{path}: key 'lr_scheduler': 'sawtooth' is not one of ['linear', 'cosine', 'cosine_with_restarts', "
        "'polynomial', 'constant', 'constant_with_warmup', 'inverse_sqrt', 'reduce_lr_on_plateau', "
        "'cosine_with_min_lr', 'cosine_warmup_with_min_lr', 'warmup_stable_decay', 'greedy', 'one_cycle', 'rex']",
    ),
    "a mistyped key of a rate group": (
        lambda text: text + "lr_groups: [{nam: m, modules: [q_proj], lr: 1.0}]\n",
        "{path}: unknown key 'lr_groups.0.nam'; did you mean 'name'?",
    ),
    "a rate for nothing": (
        lambda text: text + "lr_groups: [{name: m, modules: [layers.3.self_attn.q_proj, magnitude_vektor], lr: 1.0}]\n",
        "{path}: key 'lr_groups': magnitude_vektor is in the name of nothing that is trained; take a part of "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight, say q_proj, k_proj, v_proj, lora_A, "
        "lora_B, lora_magnitude_vector",
    ),
    "without the plugin": (
        lambda text: text.replace("  - fastdora.FastDoraPlugin\n", ""),
        "{path}: key 'plugins': add fastdora.FastDoraPlugin; without it rows are lost in silence",
    ),
    "not YAML": (
        lambda text: text + "lora_r: [8\n",
        "{path}: line {end}: not valid YAML (expected ',' or ']', but got '<stream end>'); mend that line",
    ),
    "a list": (
        lambda text: "- lora_r: 8\n",
        "{path}: holds no keys; a recipe is a mapping of axolotl's keys",
    ),
    "empty": (
        lambda text: "",
        "{path}: holds no keys; a recipe is a mapping of axolotl's keys",
    ),
    "a tag that runs code": (
        lambda text: text + "hub_model_id: !!python/object/apply:os.system [ls]\n",
        "{path}: line {after}: not valid YAML (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system'); mend that line",
    ),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_mutated_recipe_fails_with_one_line(case, tmp_path):
    mutate, expected = MUTATIONS[case]
    text = (recipes.RECIPES / "sentiment_r8_dora.yaml").read_text(encoding="utf-8")
    path = tmp_path / "sentiment_r8_dora.yaml"
    path.write_text(mutate(text), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    with pytest.raises(UserError) as error:
        recipes.load(path)
    assert "\n" not in str(error.value)
    after = len(text.splitlines()) + 1
    assert str(error.value) == expected.format(path=path, after=after, end=after + 1)


def test_a_recipe_that_is_not_utf8(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("# \xfc\n".encode("latin-1"))
    with pytest.raises(UserError, match="r.yaml: not UTF-8 at byte 2; save it as UTF-8"):
        recipes.load(path)


@pytest.mark.parametrize(
    "name, found",
    [
        ("sentiment_r8_dora", "sentiment_r8_dora"),
        ("sentiment_llama_3_1_8b_8bits_r8_dora", "sentiment_r8_dora"),
        ("finer_llama_3_1_8b_4bits_r4", "finer_4bit_r4_lora"),
        ("xbrl_extract_llama_3_1_8b_8bits_r8_dora_a32", "xbrl_extract_r8_a32_dora"),
    ],
)
def test_find(name, found):
    assert recipes.find(name).stem == found


def test_find_by_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1\n", encoding="utf-8")
    assert recipes.find(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("sentment_r8_dora", "did you mean sentiment_r8_dora,"),
        ("sentiment_llama_3_1_8b_8bit_r8_dora", "did you mean sentiment_llama_3_1_8b_8bits_r8_dora,"),
        ("", "`make recipes` lists them"),
        ("../../etc/passwd", "`make recipes` lists them"),
    ],
)
def test_a_mistyped_recipe_names_the_nearest(name, hint):
    with pytest.raises(UserError) as error:
        recipes.find(name)
    assert str(error.value).startswith(f"RECIPE={name}: no such recipe; {hint}") and "\n" not in str(error.value)


@given(st.text(max_size=60))
def test_any_name_is_found_or_refused_in_one_line(name):
    try:
        assert recipes.find(name).is_file()
    except UserError as error:
        assert str(error).startswith("RECIPE=")


def test_list_and_filter(command):
    shown = command("tools.recipes").stdout.splitlines()
    assert len(shown) == len(ALL) + 1
    filtered = command("tools.recipes", "--task", "sentiment").stdout.splitlines()
    assert len(filtered) == 8 and all("sentiment" in line for line in filtered[1:])
    assert any(line.split() == "sentiment_r8_dora sentiment 8 8 16 dora 4,915,200".split() for line in filtered)
    typo = command("tools.recipes", "--task", "sentimnt")
    assert (typo.returncode, typo.stderr) == (1, "error: TASK=sentimnt: no such task; did you mean sentiment\n")


def test_check_command_names_what_drifted(command, house):
    assert command("tools.recipes", "--check").returncode == 0
    path = house / "recipes" / "headline_r8_lora.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("warmup_steps: 10", "warmup_steps: 11"), encoding="utf-8")
    done = command("tools.recipes", "--check")
    assert done.returncode == 1
    assert done.stderr == (
        "error: recipes/headline_r8_lora.yaml: key 'warmup_steps' is 11, in the other recipes it is 10\n"
    )


def test_recipes_are_plain_yaml():
    for name, recipe in ALL.items():
        assert yaml.safe_load((recipes.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")) == recipe


def test_a_path_that_is_not_there_is_no_recipe_of_its_last_name(tmp_path):
    for path in (tmp_path / "sentiment_r8_dora.yaml", tmp_path / "mine.yml", "./sentiment_r8_dora.yaml"):
        with pytest.raises(UserError, match=f"^RECIPE={path}: no such file; give a"):
            recipes.find(str(path))
    assert recipes.find("sentiment_r8_dora.yaml") == recipes.RECIPES / "sentiment_r8_dora.yaml"


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "gpt2"}', '{"hidden_size": "x"}'])
def test_a_base_model_of_another_kind_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="^.*config.json: has not hidden_size, .*; take a model of Llama's kind$"):
        recipes.shape(str(tmp_path))


@pytest.mark.parametrize(
    "line, said",
    [
        ("? [a]\n: 1", "line 1: a key is a list or a mapping; write a name"),
        ("x: 2026-13-45", "not valid YAML .month must be in 1..12.*; mend that line"),
    ],
)
def test_yaml_that_python_cannot_hold_is_one_line(line, said, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(line)
    with pytest.raises(RecipeError, match=f"^{path}: {said}$"):
        read_recipe(path)


def test_a_key_that_is_missing_is_named():
    recipe = read_recipe(recipes.RECIPES / "sentiment_r8_dora.yaml")
    for key in ("base_model", "learning_rate"):
        rest = {name: value for name, value in recipe.items() if name != key}
        with pytest.raises(RecipeError, match=f"^r.yaml: key '{key}' is missing; add it$"):
            check_keys(rest, "r.yaml", recipes.axolotl_schema(recipe["plugins"]))
