"""What a recipe must say beyond axolotl's own schema: its values, its name, its paths, and which keys are refused."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from fastdora.plugin.keys import layout_fault
from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.recipes.bases import layer_names, value_for
from finlora.recipes.names import IN_NAME, compose_name, decided, parts_of
from finlora.recipes.recipe import Recipe

REFUSED = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text(encoding="utf-8"))
REMEDIES = {  # by pydantic's names of errors
    "greater_than": "give it a value above {gt:g}",
    "greater_than_equal": "give it a value of at least {ge:g}",
    "less_than": "give it a value below {lt:g}",
    "float_parsing": "give it a number",
    "value_error": "{error}",
}
ROWS = ("datasets", "test_datasets")
MOST_LAYERS = 200  # of any Llama; a base model of unknown sizes may have so many


AboveZero = Annotated[float, Field(gt=0)]


class Rows(BaseModel):
    """An entry of `datasets` or `test_datasets`: a file of conversations, one a line."""

    path: str
    type: Any


def one_precision(four_bit: bool, info: ValidationInfo) -> bool:
    if four_bit and info.data.get("load_in_8bit"):
        raise ValueError("load_in_8bit is true as well; keep one")
    return four_bit


def adapter_for_bits(adapter: str, info: ValidationInfo) -> str:
    # With load_in_4bit and `adapter: lora` axolotl (0.19.0) trains a base that is not quantized.
    if adapter != (expected := "qlora" if info.data.get("load_in_4bit") else "lora"):
        raise ValueError(f"set {expected}: it is qlora with load_in_4bit: true and lora without")
    return adapter


def layers_of_the_base(targets: Any, info: ValidationInfo) -> list[str]:
    layers = info.context["layers"]
    if info.data.get("lora_target_linear"):
        if targets:
            raise ValueError("lora_target_linear is true as well; keep one")
        return layers
    if not isinstance(targets, list) or not targets:
        raise ValueError("write a list, as in [q_proj, v_proj], or set lora_target_linear: true for all of them")
    for number, target in enumerate(targets):
        if target in targets[:number]:
            raise ValueError(f"{target} is listed twice; keep one")
        if layers and target not in layers:
            raise ValueError(f"{target} is none of {', '.join(layers)}")
    return targets


def groups_of_trained_parameters(groups: Any, info: ValidationInfo) -> Any:
    """Axolotl ignores a module of `lr_groups` that no trained parameter has in its name."""
    targets, dora = info.data.get("lora_target_modules"), info.data.get("peft_use_dora")
    if not targets:
        return groups  # that key's own error comes first
    parts = ["lora_A", "lora_B", *["lora_magnitude_vector"] * bool(dora)]
    names = itertools.product(range(MOST_LAYERS), ("self_attn", "mlp"), targets, parts)
    trained = ["base_model.model.model.layers.{}.{}.{}.{}.default.weight".format(*name) for name in names]
    saved = info.data.get("lora_modules_to_save") or []
    trained += [f"base_model.model.{name}.modules_to_save.default.weight" for name in saved]
    for module in (module for group in groups or [] for module in group["modules"]):
        if not any(module in name for name in trained):
            if "magnitude" in module and not dora:
                raise ValueError(f"LoRA has no {module}; take a recipe with DoRA")
            some = ", ".join([*targets, *parts])
            raise ValueError(
                f"{module} is in the name of nothing that is trained; take a part of {trained[0]}, say {some}"
            )
    return groups


def initial_weights_that_are_set(value: Any) -> Any:
    if value is False:
        raise ValueError("axolotl (0.19.0) ignores it, and B begins at zero as with true; remove it")
    return value


def template_that_is_read(template: Any, info: ValidationInfo) -> Any:
    if template and info.data.get("chat_template") not in (None, "jinja"):
        raise ValueError(f"axolotl takes chat_template: {info.data['chat_template']} instead; set that to jinja")
    return template


def kernel_is_off(on: Any, info: ValidationInfo) -> Any:
    """With DoRA axolotl's own kernels must be off; left out, it switches them on by itself."""
    if info.data.get("peft_use_dora") and on is not False:
        raise ValueError("axolotl's LoRA kernels train DoRA with a stale norm (0.19.0); set it to false")
    return on


Kernel = Annotated[Any, Field(validate_default=True), AfterValidator(kernel_is_off)]


class Keys(BaseModel):
    """What checks, evaluation and merging read. Axolotl has a default for most; a recipe states them."""

    load_in_8bit: bool
    load_in_4bit: Annotated[bool, AfterValidator(one_precision)]
    adapter: Annotated[str, AfterValidator(adapter_for_bits)]
    peft_use_dora: bool
    peft_use_rslora: bool
    output_dir: str
    dataset_prepared_path: str
    lora_r: AboveZero
    lora_alpha: AboveZero
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    lora_target_linear: bool | None = None
    lora_target_modules: Annotated[Any, Field(validate_default=True), AfterValidator(layers_of_the_base)] = None
    lora_modules_to_save: Any = None
    lr_groups: Annotated[Any, AfterValidator(groups_of_trained_parameters)] = None
    peft_init_lora_weights: Annotated[Any, AfterValidator(initial_weights_that_are_set)] = None
    chat_template: Any = None
    chat_template_jinja: Annotated[Any, AfterValidator(template_that_is_read)] = None
    datasets: list[Rows]
    test_datasets: list[Rows] | None = None
    sequence_len: AboveZero
    micro_batch_size: AboveZero
    gradient_accumulation_steps: AboveZero
    num_epochs: AboveZero
    learning_rate: AboveZero
    lora_qkv_kernel: Kernel = None
    lora_mlp_kernel: Kernel = None
    lora_o_kernel: Kernel = None
    lora_embedding_kernel: Kernel = None


def check_values(recipe: Recipe) -> None:
    """Raise UserError for the first key that is refused, missing, or has a value that would not train as it says."""
    keys = recipe.settings
    values = [("recipe", key, key, value) for key, value in keys.items() if value != keys["base_model"]]
    for kind in ROWS:
        for number, entry in enumerate(keys.get(kind) or []):
            values += [("rows", f"{kind}.{number}.{key}", key, value) for key, value in entry.items()]
    for kind, name, key, value in values:
        if reason := why_refused(kind, key, value):
            raise UserError(f"{recipe.where(name)}{reason}")
    try:
        Keys.model_validate(keys, context={"layers": recipe.layers})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{recipe.where('.'.join(map(str, first['loc'])))}{_fault(first)}") from None
    if fault := layout_fault(keys):
        key, remedy = fault
        raise UserError(f"{recipe.where(key)}: {remedy}")
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        check_pattern(recipe, key)


def check_pattern(recipe: Recipe, key: str) -> None:
    """UserError for a rank or alpha of no layer, which PEFT would drop in silence (the plugin checks unknown bases)."""
    shape = recipe.shape
    layers = [name for target in recipe.targets for name in layer_names(target, shape)] if shape else []
    for pattern in recipe.settings.get(key) or {}:
        try:
            found = [name for name in layers if value_for(name, {pattern: True}, False)]
        except re.error as error:
            raise UserError(f"{recipe.where(key)}: {pattern} is no regular expression ({error}); fix it") from error
        if layers and not found:
            raise UserError(
                f"{recipe.where(key)}: {pattern} is no adapted layer; take one of {', '.join(recipe.targets)}, or a "
                f"regular expression for the end of a name such as {layers[0]}"
            )


def why_refused(kind: str, key: str, value: Any) -> str | None:
    """How an error goes on after a key with this value that is refused; None for another.

    kind: `recipe`, or `rows` for a key of a dataset's entry.
    """
    for entry in REFUSED[kind]:
        if key in entry["keys"] and value and value not in entry.get("unless", []):
            return f"{' is ' + json.dumps(value) if 'unless' in entry else ''}: {entry['why']}; {entry['instead']}"
    return None


def _fault(error: ErrorDetails) -> str:
    """How pydantic's error on a key goes on after the key."""
    if error["type"] == "missing":
        return " is missing; give it a value"
    value, context = json.dumps(error["input"], default=str), error.get("ctx", {})
    remedy = REMEDIES.get(error["type"], error["msg"]).format(**context)
    return f" is {value}; {remedy}" if len(value) < 60 else f": {remedy}"


def check_name(recipe: Recipe) -> None:
    """UserError where a recipe's content is not what its name says (names outside the grammar say nothing).

    A recipe writes to outputs/<name>; one that lies in outputs/ itself, as a sweep's points do, beside itself.
    """
    path, keys, parts = recipe.path, recipe.keys, recipe.parts
    if not parts:
        return
    folder, outputs = path.resolve().parent, (ROOT / "outputs").resolve()
    out = Path("outputs") / (folder.relative_to(outputs) if folder.is_relative_to(outputs) else Path()) / path.stem
    for key, value in decided(parts, out).items():
        if keys.get(key) != value:
            other = ""
            if key in IN_NAME and None not in (content := parts_of(keys)).values():
                other = f"; `make new RECIPE={compose_name(parts | content)}` writes the recipe with it"
            raise UserError(
                f"{recipe.where(key)} is {keys.get(key)}, but the name says {value}; change one of them{other}"
            )


def check_paths(recipe: Recipe) -> None:
    """UserError for a path of the recipe that leads out of this repository, through `..`, a link, or from the root.

    What is written lies in outputs/. A base model may lie anywhere: it is only read, and only as safetensors.
    """
    keys, outputs = recipe.settings, ROOT / "outputs"
    for key in ("output_dir", "dataset_prepared_path"):
        where, folder = f"{recipe.where(key)}: {keys[key]}", Path(os.path.normpath(ROOT / keys[key]))
        if folder == outputs or not folder.is_relative_to(outputs):
            raise UserError(f"{where} is not in outputs/; name a folder there")
        inside = (outputs / part for part in (folder.relative_to(outputs), *folder.relative_to(outputs).parents))
        if link := next((part for part in inside if part != outputs and part.is_symlink()), None):
            raise UserError(
                f"{where}: {link.relative_to(ROOT)} is a link; remove it and name a folder in outputs/, which may "
                "itself be a link to another disk"
            )
    # Each of these may be a link or a mount of its own.
    roots = [folder.resolve() for folder in (ROOT, ROOT / "data", ROOT / "data" / "raw", ROOT / "data" / "prepared")]
    for key, name in _files(keys):
        where, file = f"{recipe.where(key)}: {name}", ROOT / name
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise UserError(f"{where} leads out of the repository; copy it to data/")
        if not file.is_file() and Path(name).parts[:2] != ("data", "prepared"):  # `make train` prepares those
            hub = "; rows of the hub are downloaded first, and `make data FILE=` takes them" if key in ROWS else ""
            raise UserError(f"{where} is no file here; fix the path{hub}")


def _files(keys: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, path) of each file that the recipe names: rows, templates, DeepSpeed's configuration."""
    entries = [(kind, entry) for kind in ROWS for entry in keys.get(kind) or []]
    files = [(kind, entry["path"]) for kind, entry in entries]
    for key, holder in [("", keys), *((f"{kind}.", entry) for kind, entry in entries)]:
        template = holder.get("chat_template_jinja")
        # Axolotl (0.19.0) takes a path that is not there for the template itself: every prompt would be that path.
        if template and "\n" not in template and "{" not in template:
            files.append((f"{key}chat_template_jinja", template))
    if isinstance(keys.get("deepspeed"), str):
        files.append(("deepspeed", keys["deepspeed"]))
    return files
