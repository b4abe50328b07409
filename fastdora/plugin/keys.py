"""Recipe files read strictly: no duplicate key, no key and no type that axolotl's own schema does not know."""

import difflib
import functools
import importlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import create_model
from pydantic.json_schema import GenerateJsonSchema


class RecipeError(Exception):
    """A recipe that cannot be trusted. Its text is one line that names the file, the key and what to do."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with duplicate keys refused: YAML forbids them, PyYAML lets the last one win."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"line {key.start_mark.line + 1}: a key is a list or a mapping; write a name")
        if key.value in seen:
            raise RecipeError(f"line {key.start_mark.line + 1}: key '{key.value}' stands twice; keep one")
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
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        recipe = yaml.load(text, _StrictLoader)  # noqa: S506 (a SafeLoader)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date that is none
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(
            f"{path}: {line}not valid YAML ({getattr(error, 'problem', error)}); mend that line"
        ) from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: holds no keys; a recipe is a mapping of axolotl's keys")
    return recipe


class _JsonSchema(GenerateJsonSchema):
    """Pydantic's generator fails on axolotl's enums of torch dtypes; recipes name their members as strings."""

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
            raise RecipeError(f"key 'plugins': {plugin} cannot be imported ({error}); mend or remove it") from error
        if arguments:
            module, _, name = arguments.rpartition(".")
            models.append(getattr(importlib.import_module(module), name))
    schema = strict_schema(create_model("Recipe", __base__=(AxolotlInputConfig, *models)))
    for key, values in _names().items():
        schema["properties"][key] = {"enum": [*values, None]}
    return schema


def _names() -> dict[str, list[str]]:
    """What keys may be that axolotl's schema calls strings: it would find out after the base model is loaded."""
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
    from jsonschema import Draft202012Validator

    errors = list(Draft202012Validator(schema).iter_errors(recipe))
    if not errors:
        return
    error = _deepest(_clearest(errors))
    where = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        unknown = str(_unknown_keys(error)[0])  # YAML has numbers as keys too
        near = difflib.get_close_matches(unknown, list(error.schema["properties"]), 1)
        hint = f"did you mean '{near[0]}'?" if near else "remove it"
        raise RecipeError(f"{source}: unknown key '{where + '.' if where else ''}{unknown}'; {hint}")
    if error.validator in ("anyOf", "oneOf") and all(inner.validator == "type" for inner in error.context):
        allowed = " or ".join(sorted({inner.validator_value for inner in error.context} - {"null"}))
        raise RecipeError(f"{source}: key '{where}' is {error.instance!r}; it must be {allowed}")
    if error.validator == "enum":
        values = [value for value in error.validator_value if value is not None]
        if near := difflib.get_close_matches(str(error.instance), map(str, values), 1):
            raise RecipeError(f"{source}: key '{where}' is {error.instance!r}; did you mean '{near[0]}'?")
        raise RecipeError(f"{source}: key '{where}': {error.instance!r} is not one of {values}")
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        raise RecipeError(f"{source}: key '{where + '.' if where else ''}{missing}' is missing; add it")
    where = f"key '{where}': " if where else ""
    raise RecipeError(f"{source}: {where}{error.message[:200]}")


def _clearest(errors: list):
    return min(errors, key=lambda error: (error.validator != "additionalProperties", _weight(error)))


def _unknown_keys(error) -> list[str]:
    return [key for key in error.instance if key not in error.schema["properties"]]


def _weight(error) -> int:
    """How far a value is from what an error's schema wants: unknown keys count one each."""
    if error.validator == "additionalProperties":
        return len(_unknown_keys(error))
    return min((sum(map(_weight, branch)) for branch in _branches(error)), default=1)


def _branches(error) -> list[list]:
    branches: dict[int, list] = {}
    for inner in error.context:
        branches.setdefault(inner.relative_schema_path[0], []).append(inner)
    return list(branches.values())


def _deepest(error):
    """Of alternatives (anyOf) follow the one that fits best, as long as one fits better than all others."""
    while branches := _branches(error):
        of_its_type = [branch for branch in branches if not any(_is_of_another_type(inner) for inner in branch)]
        branches = of_its_type or branches
        branches.sort(key=lambda branch: sum(map(_weight, branch)))
        weights = [sum(map(_weight, branch)) for branch in branches[:2]]
        if len(branches[0]) > 1 or weights[0] == weights[-1] and len(branches) > 1:
            nested = [branch for branch in branches if any(inner.context or inner.relative_path for inner in branch)]
            if not nested:
                return error
            branches = nested
        error = _clearest(branches[0])
    return error


def _is_of_another_type(error) -> bool:
    return error.validator == "type" and not error.relative_path
