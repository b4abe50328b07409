"""Recipe files read strictly: no duplicate key, no key and no type that axolotl's own schema does not know."""

import difflib
import functools
import hashlib
import importlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import create_model
from pydantic.json_schema import GenerateJsonSchema

# An environment variable: record CUDA graphs in every process of DDP too. Off by default until it has run on GPUs.
GRAPHS_UNDER_DDP = "FASTDORA_DDP_GRAPHS"
WITHOUT_GRAPHS = ("gradient_checkpointing", "deepspeed", "fsdp_config", "fsdp")  # keys under which none are recorded


class RecipeError(Exception):
    """A recipe that cannot be trusted. Its text is one line that names the file, the key and what to do."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with duplicate keys refused: YAML forbids them, PyYAML keeps the last one."""

    def construct_object(self, node, deep=False):
        # PyYAML 6.0 raises whatever its conversion meets for a bad `2026-13-45`, `!!int x` or `!!timestamp x`.
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"not a {kind}: {error}", problem_mark=node.start_mark) from error


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"line {key.start_mark.line + 1}: a key is a list or a mapping; write a name")
        if key.value in seen:
            raise RecipeError(f"line {key.start_mark.line + 1}: key {key.value!r} occurs twice; keep one")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file. Raises RecipeError naming the file, and the line where there is one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); check its path and permissions") from error
    try:
        recipe = yaml.load(text, _StrictLoader)  # noqa: S506 (a SafeLoader)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        character = f"the control character {error.character:#04x}"
        raise RecipeError(f"{path}: line {line}: not valid YAML ({character} is not allowed); remove it") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise RecipeError(f"{path}: line {line}: not valid YAML ({error.problem}); fix that line") from error
    if not isinstance(recipe, dict):
        what = "is empty" if recipe is None else "is not a mapping"
        raise RecipeError(f"{path}: {what}; write a mapping of keys to values")
    return recipe


class _JsonSchema(GenerateJsonSchema):
    """Pydantic 2's generator fails on axolotl's enums of torch dtypes; recipes name their members as strings."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}

    def enum_schema(self, schema):
        if any(not isinstance(member.value, str | int | float) for member in schema["members"]):
            return {"enum": [member.name for member in schema["members"]]}
        return super().enum_schema(schema)


@functools.cache
def input_schema(plugins: tuple[str, ...]) -> dict[str, Any]:
    """The strict JSON schema of axolotl's recipe keys and those of `plugins` (import paths), as axolotl joins them.

    Raises RecipeError naming a plugin that cannot be imported.
    """
    from axolotl.utils.schemas.config import AxolotlInputConfig

    models = []
    for plugin in plugins:
        try:
            module, _, name = plugin.rpartition(".")
            arguments = getattr(importlib.import_module(module), name)().get_input_args()
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise RecipeError(f"key 'plugins': {plugin} cannot be imported ({error}); fix or remove it") from error
        if arguments:
            module, _, name = arguments.rpartition(".")
            models.append(getattr(importlib.import_module(module), name))
    schema = strict_schema(create_model("Recipe", __base__=(AxolotlInputConfig, *models)))
    for key, values in _names().items():
        schema["properties"][key] = {"enum": [*values, None]}
    return schema


def kept_schema(plugins: list[str], folder: Path) -> dict[str, Any]:
    """`input_schema`, kept in a file of `folder`, because importing axolotl takes ten seconds. Raises as it does."""
    names = tuple(name for name in plugins if isinstance(name, str))
    source = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("keys.py", "args.py"))
    state = "".join(version(package) for package in ("axolotl", "transformers", "pydantic")) + str(names)
    kept = folder / f"axolotl-schema-{hashlib.sha256(source + state.encode()).hexdigest()[:12]}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")  # several commands may write it at once
    part.write_text(json.dumps(input_schema(names)), encoding="utf-8")
    part.replace(kept)
    return input_schema(names)


def read_checked(path: Path, folder: Path) -> dict[str, Any]:
    """`read_recipe`, with our plugin, and with keys that axolotl and the plugins know (schema kept in `folder`)."""
    recipe = read_recipe(path)
    plugins = recipe.get("plugins")
    if not isinstance(plugins, list) or "fastdora.FastDoraPlugin" not in plugins:
        raise RecipeError(f"{path}: key 'plugins': add fastdora.FastDoraPlugin; without it rows are lost in silence")
    check_keys(recipe, str(path), kept_schema(plugins, folder))
    return recipe


def _names() -> dict[str, list[str]]:
    """The values of keys that are any string in axolotl's schema: it refuses others only after the base is loaded."""
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    return {
        "optimizer": [name.value for name in (*OptimizerNames, *CustomSupportedOptimizers)],
        "lr_scheduler": [*(name.value for name in SchedulerType), "one_cycle", "rex"],  # the last two are axolotl's own
    }


def strict_schema(model: type) -> dict[str, Any]:
    """The JSON schema of a pydantic model in which every object with named properties forbids all others."""
    schema = model.model_json_schema(schema_generator=_JsonSchema)

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node:
                node["additionalProperties"] = False
            for value in node.values():
                close(value)
        elif isinstance(node, list):
            for value in node:
                close(value)

    close(schema)
    return schema


def check_keys(recipe: dict[str, Any], source: str, schema: dict[str, Any]) -> None:
    """Raise RecipeError for the first key (nested ones too) or value type that the strict schema does not allow."""
    # Imported here: it takes a third of a second, which a command that only reads a recipe does not need.
    from jsonschema import Draft202012Validator

    errors = list(Draft202012Validator(schema).iter_errors(recipe))
    if errors:
        raise RecipeError(f"{source}: {_sentence(_clearest(errors))}")


def _sentence(error) -> str:
    where = ".".join(map(str, error.absolute_path))
    inside = f"{where}." if where else ""
    if error.validator == "additionalProperties":
        unknown = str(_unknown_keys(error)[0])  # keys may be numbers in YAML
        near = difflib.get_close_matches(unknown, list(error.schema["properties"]), 1)
        remedy = f"did you mean '{near[0]}'?" if near else "remove it"
        return f"unknown key {inside + unknown!r}; {remedy}"
    if error.validator in ("anyOf", "oneOf") and all(inner.validator == "type" for inner in error.context):
        allowed = " or ".join(sorted({inner.validator_value for inner in error.context} - {"null"}))
        return f"key '{where}' is {error.instance!r}; it must be {allowed}"
    if error.validator == "enum":
        values = [value for value in error.validator_value if value is not None]
        if near := difflib.get_close_matches(str(error.instance), map(str, values), 1):
            return f"key '{where}' is {error.instance!r}; did you mean '{near[0]}'?"
        return f"key '{where}': {error.instance!r} is not one of {values}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return f"key '{inside}{missing}' is missing; add it"
    return (f"key '{where}': " if where else "") + error.message[:200]


def _clearest(errors: list):
    """The error to show, an unknown key first; of alternatives (anyOf) one of the branch that is nearest to the value.

    jsonschema's best_match compares single errors; a branch is as near as all its errors together.
    """
    error = min(errors, key=lambda error: (error.validator != "additionalProperties", _changes(error)))
    branches = sorted(_branches(error), key=_distance)
    if not branches or (len(branches) > 1 and _distance(branches[0]) == _distance(branches[1])):
        return error
    if len(branches[0]) > 1 and not _is_nested(branches[0]):  # several remedies: show the alternatives
        return error
    return _clearest(branches[0])


def _branches(error) -> list[list]:
    """The errors of each alternative of an anyOf; none for another error."""
    numbers = dict.fromkeys(inner.relative_schema_path[0] for inner in error.context)
    return [[inner for inner in error.context if inner.relative_schema_path[0] == number] for number in numbers]


def _distance(branch: list) -> tuple[bool, int, bool]:
    """How far a value is from an alternative: of another type, the changes it needs, whether they are at its top."""
    other_type = any(error.validator == "type" and not error.relative_path for error in branch)
    return other_type, sum(map(_changes, branch)), not _is_nested(branch)


def _changes(error) -> int:
    """How many changes satisfy an error: each unknown key is one."""
    if error.validator == "additionalProperties":
        return len(_unknown_keys(error))
    return min((sum(map(_changes, branch)) for branch in _branches(error)), default=1)


def _is_nested(branch: list) -> bool:
    return any(error.context or error.relative_path for error in branch)


def _unknown_keys(error) -> list[str]:
    return [key for key in error.instance if key not in error.schema["properties"]]


def layout_fault(recipe: dict[str, Any]) -> tuple[str, str] | None:
    """The key by which rows would lie otherwise than the layers read them, and the remedy; None where there is none."""
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if (recipe.get(key) or 1) != 1:
            return key, "label and segment positions are those of whole rows, not of a process's part; remove it"
    if not recipe.get("fastdora_shared_prefixes"):
        limited = recipe.get("fastdora_rows_per_prefix") is not None
        return ("fastdora_rows_per_prefix", "needs fastdora_shared_prefixes: true") if limited else None
    if recipe.get("merge_lora"):  # `axolotl merge-lora` takes attention and packing out of the recipe
        return None
    together = recipe.get("fastdora_rows_per_prefix")
    needs = {
        "sample_packing": (recipe.get("sample_packing"), "set it to true"),
        "attn_implementation": (recipe.get("attn_implementation") == "sdpa", "set it to sdpa, which fastdora extends"),
        "curriculum_sampling": (not recipe.get("curriculum_sampling"), "remove it"),
        "sample_packing_sequentially": (not recipe.get("sample_packing_sequentially"), "remove it"),
        "streaming": (not recipe.get("streaming"), "remove it"),
        "multipack_real_batches": (not recipe.get("multipack_real_batches"), "remove it"),
        "fastdora_rows_per_prefix": (together is None or together > 0, "set it to 1 or more, or to null"),
    }
    fault = next(((key, remedy) for key, (holds, remedy) in needs.items() if not holds), None)
    return fault and (fault[0], f"{fault[1]}, or set fastdora_shared_prefixes: false")
