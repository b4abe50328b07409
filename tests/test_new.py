"""`make new`: a recipe by its name, equal to what `sed` and `make check` would have come to."""

import yaml
from failures import failed, refuses
from hypothesis import given
from hypothesis import strategies as st

from finlora.recipes import bases
from finlora.recipes import names as recipe_names
from finlora.recipes.factorise import comments, factorise
from finlora.recipes.memory import memory_line
from finlora.recipes.new import draft, new, with_value

ALL = {name: (recipe_names.RECIPES / f"{name}.yaml").read_text(encoding="utf-8") for name in recipe_names.names()}
KEYS = {name: yaml.safe_load(text) for name, text in ALL.items()}
COMMENTS = {name: comments(text) for name, text in ALL.items()}
OF_TASKS = [name for name in ALL if recipe_names.parse_name(name)["task"] in recipe_names.tasks()]


def test_every_recipe_can_be_written_from_another():
    for name in OF_TASKS:
        like, text = draft(name)
        assert like != name and text == ALL[name], (name, like)


@given(
    st.sampled_from(recipe_names.tasks()),
    st.sampled_from(list(bases.load_bases())),
    st.sampled_from([16, 8, 4]),
    st.integers(1, 256),
    st.integers(1, 256),
    st.sampled_from(["lora", "dora", "rslora"]),
)
def test_any_recipe_is_decided_by_its_name(task, base, bits, rank, alpha, method):
    parts = {"task": task, "base": base, "bits": bits, "r": rank, "alpha": alpha, "method": method}
    name = recipe_names.compose_name(parts)
    _, text = draft(name)
    keys = yaml.safe_load(text)
    assert recipe_names.parts_of(keys) == {key: parts[key] for key in ("bits", "r", "alpha", "method")}
    assert keys["base_model"] == bases.load_bases()[base].recipe.base_model
    assert text.splitlines()[1] == memory_line(keys, bases.shape(keys["base_model"]))
    found = [*factorise(KEYS | {name: keys}), *factorise(COMMENTS | {name: comments(text)}, "comment on key")]
    assert found == []


def test_a_key_that_only_one_base_has_comes_and_goes():
    text = ALL["sentiment_r8_dora"]
    more = with_value(text, "eot_tokens", ["<|eot_id|>", "<|eom_id|>"])
    assert yaml.safe_load(more) == yaml.safe_load(text) | {"eot_tokens": ["<|eot_id|>", "<|eom_id|>"]}
    assert with_value(more, "eot_tokens", None) == text == with_value(text, "eot_tokens", None)


def test_names_that_are_none():
    for name, words in {
        "sentiment_r8_dora": ["already", "another name"],
        "sentment_r8_dora": ["did you mean sentiment_r8_dora"],
        "sentiment_qwen_3_8b_r8_dora": ["qwen_3_8b", "did you mean qwen3_8b"],
        "sentiment_r16_4bit_dora": ["a name is", "sentiment_4bit_r16_dora"],
        "sentiment_r16_a16_dora": ["default", "sentiment_r16_dora"],
        "demo_r9_dora": ["demo", "no task", "sentiment"],
        "recipes/x": ["a name is"],
        "": ["a name is"],
    }.items():
        with refuses(*words, file=f"RECIPE={name}"):
            new(name)


def test_the_commands(command, house):
    name = "headline_qwen3_8b_4bit_r16_dora"
    path = house / "recipes" / f"{name}.yaml"
    failed(command("finlora", "train", name), "no such recipe", f"make new RECIPE={name}", file=f"RECIPE={name}")
    done = command("finlora", "new", name)
    assert done.returncode == 0 and f"make plan RECIPE={name}" in done.stdout
    written = path.read_bytes()
    assert command("finlora", "check").returncode == 0
    failed(command("finlora", "new", name), "already", file=f"RECIPE={name}")
    assert path.read_bytes() == written
    failed(command("finlora", "new", "headline_qwen3_9b_r8_dora"), "qwen3_8b", file="RECIPE=headline_qwen3_9b_r8_dora")
    path.write_text(path.read_text(encoding="utf-8").replace("lora_r: 16", "lora_r: 32"), encoding="utf-8")
    done = command("finlora", "check")
    failed(done, "make new RECIPE=headline_qwen3_8b_4bit_r32_dora", file=path, key="lora_r")
