"""Recipe keys: files read strictly, axolotl's schema closed, and what each wrong key or value is told.

What these faults look like in a whole recipe is in test_recipes.py.
"""

import copy
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from failures import refuses
from pydantic import BaseModel

from fastdora.plugin import keys
from fastdora.plugin.keys import (
    RecipeError,
    check_keys,
    input_schema,
    kept_schema,
    layout_fault,
    read_checked,
    read_recipe,
    strict_schema,
)


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe file."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_recipe_is_read_as_utf8_yaml(recipe):
    path = recipe("name: Zürich\nrate: 1.0e-4\ndatasets:\n  - {path: a}\n  - {path: b, more: [1, {path: c}]}\n")
    expected = {"name": "Zürich", "rate": 1e-4, "datasets": [{"path": "a"}, {"path": "b", "more": [1, {"path": "c"}]}]}
    assert read_recipe(path) == read_recipe(str(path)) == expected


@pytest.mark.parametrize(
    "content, line, words",
    [
        ("a: 1\nb: 2\na: 1\n", 3, ["key 'a'", "twice", "keep one"]),
        ("d:\n- {p: 1}\n- q: 1\n  q: 2\n", 4, ["key 'q'", "twice", "keep one"]),
        ("a: 1\n? [b]\n: 2\n", 2, ["key is a list", "write a name"]),
        ("a: 1\n? {b: 1}\n: 2\n", 2, ["key is a list", "write a name"]),
        ("a: 1\nb: [1\n", 3, ["not valid YAML", "expected", "fix that line"]),
        ("a: 1\nb: !!python/name:os.system\n", 2, ["not valid YAML", "constructor", "fix that line"]),
        ("a: 2026-13-45\n", 1, ["not valid YAML", "month", "fix that line"]),
        ("a: 1\nb: !!timestamp x\n", 2, ["not valid YAML", "timestamp", "fix that line"]),
        ("a: 1\nb: [1, !!int x]\n", 2, ["not valid YAML", "int", "'x'", "fix that line"]),
        ("b: {c: !!bool x}\n", 1, ["not valid YAML", "bool", "'x'", "fix that line"]),
        ("b: !!int ''\n", 1, ["not valid YAML", "int", "fix that line"]),
        ("b: !!map [1]\n", 1, ["not valid YAML", "map", "fix that line"]),
        ('a: 1\nb: 2\nc: "\a"\n', 3, ["not valid YAML", "control character 0x07", "remove"]),
        ('"a\\nb": 1\n"a\\nb": 2\n', 2, ["key 'a\\nb'", "twice", "keep one"]),
        ("", None, ["is empty", "mapping"]),
        ("- a: 1\n", None, ["is not a mapping", "write a mapping"]),
        (b"a: 1 # \xfc\n", None, ["not UTF-8", "byte 7", "save it as UTF-8"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(content, line, words, recipe):
    path = recipe(content)
    with refuses(*words, error=RecipeError, file=path, line=line):
        read_recipe(path)


def test_a_recipe_that_cannot_be_opened_is_refused(tmp_path):
    for path, why in (tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory"):
        with refuses("cannot be read", why, error=RecipeError, file=path):
            read_recipe(path)


class Kind(Enum):
    word = "a word"
    number = 1


class Dtype(Enum):
    """As axolotl's, whose values are torch's."""

    float32 = object()
    auto = "auto"


class Part(BaseModel):
    path: str
    weights: dict[str, int] = {}


class Whole(BaseModel):
    part: Part | None = None
    parts: list[Part] | Part = []
    kind: Kind = Kind.word
    dtype: Dtype = Dtype.float32


def test_every_object_with_named_keys_is_closed():
    schema = strict_schema(Whole)
    assert schema["additionalProperties"] is False and schema["$defs"]["Part"]["additionalProperties"] is False
    assert schema["$defs"]["Part"]["properties"]["weights"]["additionalProperties"] == {"type": "integer"}
    check_keys({"parts": [{"path": "a", "weights": {"any": 1}}], "part": None}, "r.yaml", schema)
    for wrong, key in (
        ({"part": {"path": "a", "pth": 1}}, "part.pth"),
        ({"parts": [{"path": "a", "b": 1}]}, "parts.0.b"),
    ):
        with refuses("unknown", error=RecipeError, file="r.yaml", key=key):
            check_keys(wrong, "r.yaml", schema)


def test_a_schema_may_hold_schemas_in_a_list():
    class Listed(BaseModel):
        model_config = {"json_schema_extra": {"allOf": [{"properties": {"a": {}}}, [{"properties": {"b": {}}}], {}]}}

    every = strict_schema(Listed)["allOf"]
    assert [part.get("additionalProperties") for part in (every[0], every[1][0], every[2])] == [False, False, None]


def test_members_of_an_enum_are_named_where_their_values_are_no_text_or_number():
    known = strict_schema(Whole)["$defs"]
    assert known["Dtype"]["enum"] == ["float32", "auto"] and known["Kind"]["enum"] == ["a word", 1]


class Arguments(BaseModel):
    my_key: int = 0
    my_part: Part | None = None


class WithKeys:
    def get_input_args(self) -> str:
        return "test_keys.Arguments"


class WithoutKeys:
    def get_input_args(self) -> None:
        return None


class Broken:
    def get_input_args(self) -> str:
        raise ValueError("no such thing")


NO_CLASS = "a text"


@pytest.mark.xdist_group("axolotl")
def test_axolotls_keys_and_those_of_plugins_are_known():
    schema = input_schema(("test_keys.WithKeys", "test_keys.WithoutKeys"))
    known = schema["properties"]
    assert {"base_model", "lora_r", "datasets", "my_key", "my_part"} <= known.keys()
    assert schema["additionalProperties"] is False and "my_key" not in input_schema(())["properties"]
    assert {"adamw_torch_fused", "muon", None} <= set(known["optimizer"]["enum"])  # transformers', axolotl's, unset
    assert {"cosine", "one_cycle", "rex", None} <= set(known["lr_scheduler"]["enum"])
    whole = {"base_model": "b", "learning_rate": 1e-4, "datasets": [{"path": "d", "type": "alpaca"}]}
    whole |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1}
    check_keys(whole | {"my_key": 1, "optimizer": "muon", "lr_scheduler": None}, "r.yaml", schema)
    for change, key in (
        ({"my_keys": 1}, "my_keys"),
        ({"my_part": {"path": "a", "pat": 1}}, "my_part.pat"),
        ({"my_key": "x"}, "my_key"),
        ({"optimizer": "adam_w"}, "optimizer"),
        ({"lr_scheduler": "sawtooth"}, "lr_scheduler"),
    ):
        with refuses(error=RecipeError, file="r.yaml", key=key):
            check_keys(whole | change, "r.yaml", schema)


@pytest.mark.xdist_group("axolotl")
def test_a_plugin_may_lie_in_a_package_of_packages(tmp_path, monkeypatch):
    text = "from pydantic import BaseModel\nclass Keys(BaseModel):\n    their_key: int = 0\n"
    text += "class Plugin:\n    def get_input_args(self):\n        return 'their_package.inside.Keys'\n"
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "inside.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert "their_key" in input_schema(("their_package.inside.Plugin",))["properties"]


@pytest.mark.xdist_group("axolotl")
@pytest.mark.parametrize("plugin", ["no_such_module.A", "test_keys.Missing", "Missing", "test_keys.NO_CLASS"])
def test_a_plugin_that_cannot_be_imported_is_named(plugin):
    with refuses(plugin, "cannot be imported", "fix", "remove", error=RecipeError, key="plugins"):
        input_schema((plugin,))


@pytest.mark.xdist_group("axolotl")
def test_a_plugin_that_cannot_say_its_keys_is_named():
    with refuses("test_keys.Broken", "no such thing", "remove", error=RecipeError, key="plugins"):
        input_schema(("test_keys.WithKeys", "test_keys.Broken"))


def an_object(*needed: str, **properties: Any) -> dict[str, Any]:
    """The schema of a closed object with these keys: the needed ones take anything."""
    every = dict.fromkeys(needed, {}) | properties
    return {"type": "object", "properties": every, "required": list(needed), "additionalProperties": False}


def either(*schemas: dict) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


INTEGER, TEXT, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}
ROWS = an_object("path", split=TEXT, name=TEXT, field_messages=either(TEXT, NULL))
STREAM = an_object("url", token=TEXT, split=TEXT)
SCHEMA = an_object(
    "base_model",
    "rate",
    lora_r=either(INTEGER, NULL),
    count=INTEGER,
    one=either(INTEGER),
    steps=either({"type": "number"}, TEXT, {"type": "boolean"}, NULL),
    above={"type": "integer", "exclusiveMinimum": 0},
    short={"maxItems": 1},
    small=either({"type": "integer", "maximum": 3}, TEXT),
    optimizer={"enum": ["adamw", "adafactor", "lion", None]},
    ranks={"enum": [8, 16]},
    datasets=either({"type": "array", "items": either(ROWS, STREAM)}, NULL),
    group=either(an_object(alpha=INTEGER, beta=INTEGER), an_object(inner=an_object(x=INTEGER)), an_object("other")),
    both=either(an_object("left", "right"), NULL),
    one_of={"oneOf": [INTEGER, NULL]},
)
RECIPE = {"base_model": "b", "rate": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_r": 8, "optimizer": None, "ranks": 16, "steps": 0.5, "short": [1], "small": "x"},
        {"datasets": [{"path": "a", "split": "train"}, {"url": "b"}], "group": {"inner": {"x": 1}}},
    ],
)
def test_what_the_schema_allows_passes(changes):
    assert check_keys(RECIPE | changes, "r.yaml", SCHEMA) is None


@pytest.mark.parametrize(
    "changes, key, words",
    [
        # Unknown keys, by their path; a near one is proposed.
        ({"lora_rr": 8}, "lora_rr", ["unknown key", "did you mean 'lora_r'"]),
        ({"zzzzzz": 1}, "zzzzzz", ["unknown key", "remove"]),
        ({7: 1}, "7", ["unknown key", "remove"]),
        (
            {"datasets": [{"path": "a"}, {"path": "a", "feild_messages": 1}]},
            "datasets.1.feild_messages",
            ["unknown key"],
        ),
        ({"datasets": [{"path": "a", "spilt": 1}]}, "datasets.0.spilt", ["did you mean 'split'"]),
        ({"datasets": [{"url": "a", "tokn": 1}]}, "datasets.0.tokn", ["did you mean 'token'"]),
        # The clearest of several faults: an unknown key, and of those the one that leaves the fewest others.
        ({"count": "x", "zzzzzz": 1}, "zzzzzz", ["unknown key"]),
        ({"a1": 1, "a2": 1, "group": {"inner": {"x": 1, "y": 1}}}, "a1", ["unknown key"]),
        # Types.
        ({"lora_r": "eight"}, "lora_r", ["'eight'", "must be integer"]),
        ({"steps": []}, "steps", ["[]", "must be boolean or number or string"]),
        ({"one_of": "x"}, "one_of", ["'x'", "must be integer"]),
        ({"count": "x"}, "count", ["'x' is not of type 'integer'"]),
        ({"one": "x"}, "one", ["'x' is not of type 'integer'"]),
        # Values.
        ({"optimizer": "adamv"}, "optimizer", ["'adamv'", "did you mean 'adamw'"]),
        ({"optimizer": "zzzz"}, "optimizer", ["'zzzz'", "is not one of ['adamw', 'adafactor', 'lion']"]),
        ({"ranks": 160}, "ranks", ["160", "did you mean '16'"]),
        ({"ranks": 3}, "ranks", ["3", "is not one of [8, 16]"]),
        ({"above": 0}, "above", ["0 is less than or equal to the minimum"]),
        ({"small": 9}, "small", ["9 is greater than the maximum of 3"]),
        # What is missing.
        ({"base_model": None}, "base_model", ["missing", "add"]),
        ({"rate": None}, "rate", ["missing", "add"]),
        ({"datasets": [{"path": "a"}, {}]}, "datasets.1", ["{} is not valid under any"]),
        ({"datasets": [{"split": "a"}]}, "datasets.0", ["not valid under any"]),
        ({"both": {"left": 1}}, "both.right", ["missing", "add"]),
        ({"both": {}}, "both", ["not valid under any"]),
        # Of alternatives the one that fits best, and none where several fit as well.
        ({"group": {"alpha": 1, "beta": 2, "gama": 3}}, "group.gama", ["unknown key", "remove"]),
        ({"group": {"inner": {"y": 1}}}, "group.inner.y", ["unknown key"]),
        ({"group": {"alpha": "x"}}, "group.alpha", ["'x' is not of type 'integer'"]),
        ({"group": {"alpha": "x", "beta": "y"}}, "group.alpha", ["'x' is not of type 'integer'"]),
        ({"group": {"gamma": 1}}, "group", ["{'gamma': 1} is not valid under any"]),
        ({"group": 1}, "group", ["must be object"]),
    ],
)
def test_what_the_schema_forbids_is_named_with_its_remedy(changes, key, words):
    recipe = {name: value for name, value in (RECIPE | changes).items() if value is not None}
    before = copy.deepcopy(recipe)
    with refuses(f"'{key}'", *words, error=RecipeError, file="r.yaml"):
        check_keys(recipe, "r.yaml", SCHEMA)
    assert recipe == before


def test_a_long_value_is_not_repeated_whole():
    with refuses(error=RecipeError, file="r.yaml", key="short") as caught:
        check_keys(RECIPE | {"short": ["x" * 400, 1]}, "r.yaml", SCHEMA)
    assert len(str(caught.value)) < 250


def test_a_fault_of_the_whole_recipe_names_no_key():
    with refuses("{} should be non-empty", error=RecipeError, file="r.yaml") as caught:
        check_keys({}, "r.yaml", {"minProperties": 1})
    assert "key" not in str(caught.value)


SHARED = {"fastdora_shared_prefixes": True, "sample_packing": True, "attn_implementation": "sdpa"}
OFF = "set fastdora_shared_prefixes: false"


@pytest.mark.parametrize(
    "changes, key, remedy",
    [
        ({}, None, None),
        ({"fastdora_rows_per_prefix": 1, "streaming": False}, None, None),
        ({"sample_packing": False}, "sample_packing", "set it to true, or"),
        ({"sample_packing": None}, "sample_packing", "set it to true, or"),
        ({"attn_implementation": "eager"}, "attn_implementation", "set it to sdpa, which"),
        ({"curriculum_sampling": True}, "curriculum_sampling", "remove it, or"),
        ({"sample_packing_sequentially": True}, "sample_packing_sequentially", "remove it, or"),
        ({"streaming": True}, "streaming", "remove it, or"),
        ({"multipack_real_batches": True}, "multipack_real_batches", "remove it, or"),
        ({"fastdora_rows_per_prefix": 0}, "fastdora_rows_per_prefix", "set it to 1 or more, or to null, or"),
        ({"merge_lora": True, "sample_packing": None}, None, None),  # `axolotl merge-lora` takes it out of the recipe
    ],
)
def test_what_rows_that_share_prefixes_need(changes, key, remedy):
    fault = layout_fault(SHARED | changes)
    assert (fault and fault[0]) == key and (fault is None or (fault[1].startswith(remedy) and fault[1].endswith(OFF)))
    limit = (SHARED | changes).get("fastdora_rows_per_prefix")
    unshared = layout_fault(SHARED | changes | {"fastdora_shared_prefixes": False})
    assert (unshared and unshared[0]) == (None if limit is None else "fastdora_rows_per_prefix")
    assert unshared is None or unshared[1].startswith("needs fastdora_shared_prefixes: true")


@pytest.mark.parametrize("key", ["context_parallel_size", "sequence_parallel_degree"])
@pytest.mark.parametrize("shared", [SHARED, {}])
def test_rows_are_not_shared_out_over_processes(key, shared):
    assert layout_fault(shared | {key: 1}) is None and layout_fault(shared | {key: None}) is None
    fault = layout_fault(shared | {key: 2})
    assert fault[0] == key and fault[1].startswith("label and") and fault[1].endswith("; remove it")


PLUGINS = ["fastdora.FastDoraPlugin", "axolotl.integrations.liger.LigerPlugin"]


@pytest.fixture
def asked(monkeypatch):
    """The plugins for which the schema was made, in turn; a small schema stands for axolotl's."""
    seen = []
    schema = {
        "type": "object",
        "properties": {"plugins": {}, "größe": {"type": "integer"}},
        "additionalProperties": False,
    }
    monkeypatch.setattr(keys, "input_schema", lambda names: seen.append(names) or schema)
    return seen


def test_a_schema_is_kept_for_its_plugins_and_versions(asked, tmp_path, monkeypatch):
    folder = tmp_path / "not" / "there"
    first = kept_schema([*PLUGINS, 3], folder)
    assert set(asked) == {tuple(PLUGINS)} and first["properties"]["größe"] == {"type": "integer"}
    (file,) = folder.iterdir()
    assert re.fullmatch(r"axolotl-schema-[0-9a-f]{12}\.json", file.name) and json.loads(file.read_bytes()) == first
    asked.clear()
    assert kept_schema(PLUGINS, folder) == first and not asked
    kept_schema(PLUGINS[:1], folder)  # others make another
    assert asked and len([*folder.iterdir()]) == 2
    for package in ("axolotl", "transformers", "pydantic"):
        asked.clear()
        monkeypatch.setattr(keys, "version", lambda name, package=package: "other" if name == package else "1")
        kept_schema(PLUGINS, folder)
        assert asked, package
    assert len([*folder.iterdir()]) == 5


def test_a_recipe_is_checked_as_it_is_read(asked, recipe, tmp_path):
    path = recipe(f"plugins: {PLUGINS[:1]}\ngröße: 8\n")
    assert read_checked(path, tmp_path) == {"plugins": PLUGINS[:1], "größe": 8} and set(asked) == {tuple(PLUGINS[:1])}
    assert [*tmp_path.glob("axolotl-schema-*.json")]
    path = recipe(f"plugins: {PLUGINS[:1]}\ngrösse: 8\n")
    with refuses("unknown", error=RecipeError, file=path, key="grösse"):
        read_checked(path, tmp_path)
    for plugins in ("", f"plugins: {PLUGINS[1:]}", f"plugins: {PLUGINS[0]}"):
        path = recipe(plugins + "\ngröße: 8\n")
        with refuses("add fastdora.FastDoraPlugin;", error=RecipeError, file=path, key="plugins"):
            read_checked(path, tmp_path)
