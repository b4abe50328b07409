"""What a recipe asks of its base model, told from configuration and tokenizer before any weights are fetched."""

import difflib
from typing import Any

from tokenizers import Tokenizer

from fastdora.plugin.checksums import WEIGHTS, model_files
from finlora.core.errors import UserError, first_line
from finlora.core.files import read_json
from finlora.core.paths import ROOT
from finlora.recipes.recipe import Recipe

# adapter_config.json's name of a recipe's key: what an adapter that is trained on must have, because PEFT takes them
# from it and ignores the recipe.
ADAPTER_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_trainable_token_indices": "trainable_token_indices",
}
EMBEDDINGS = {"embed_tokens", "lm_head"}


def check_base(recipe: Recipe) -> None:
    """Raise UserError where the base model or the first adapter cannot be trained as the recipe says."""
    check_config(recipe)
    check_vocabulary(recipe)
    if recipe.keys.get("lora_model_dir"):
        check_first_adapter(recipe)


def check_config(recipe: Recipe) -> None:
    """UserError where a language model of config.json's kind and size is not what the recipe trains."""
    keys, path, config = recipe.keys, recipe.path, recipe.base_config
    base = f"{path}: key 'base_model': {keys['base_model']}"
    if kinds := [kind for kind in config.get("architectures") or [] if not kind.endswith("ForCausalLM")]:
        raise UserError(f"{base} is a {kinds[0]}; take a model for causal language modelling")
    if config.get("quantization_config"):
        raise UserError(f"{base} is quantized already; take the 16-bit model, and load_in_8bit or load_in_4bit")
    if saved := keys.get("lora_modules_to_save"):
        check_saved(f"{path}: key 'lora_modules_to_save'", saved, modules_of(base, config), config)
    longest = config.get("max_position_embeddings")
    if longest and not keys.get("sample_packing") and keys["sequence_len"] > longest:  # of a pack each row counts alone
        raise UserError(
            f"{path}: key 'sequence_len' is {keys['sequence_len']}, and {keys['base_model']} has {longest} positions; "
            f"set it to {longest} or less"
        )
    layers = recipe.layers or layers_of(base, config)
    for target in keys["lora_target_modules"]:
        if target not in layers:
            raise UserError(f"{path}: key 'lora_target_modules': {target} is none of {', '.join(layers)}")


def check_saved(where: str, saved: list[str], modules: dict[str, Any], config: dict[str, Any]) -> None:
    """UserError for a name that PEFT would find in no module, or in embeddings that the base ties to its head."""
    for name in saved:
        found = [module for module in modules if module.endswith(name)]  # as PEFT (0.20.0) does
        if not found:
            parts = sorted({part for module in modules for part in (module, module.rpartition(".")[2])})
            near = difflib.get_close_matches(name, parts, 1) or sorted(EMBEDDINGS)
            raise UserError(f"{where}: {name} is no module of the base model; take one that is, {' or '.join(near)}")
        embeddings = [module for module in modules if module.rpartition(".")[2] in EMBEDDINGS]
        tied = [module for module in embeddings if any(f"{module}.".startswith(f"{part}.") for part in found)]
        if tied and config.get("tie_word_embeddings"):
            raise UserError(
                f"{where}: {name} is or contains {tied[0]}, and the base model ties its embeddings to its head: a "
                "merged model would lose one of them; remove it"
            )


def layers_of(base: str, config: dict[str, Any]) -> list[str]:
    """The linear layers of an architecture's blocks: Phi-3, say, has one for q, k and v. base: begins an error."""
    import torch  # takes seconds, which the architectures that are known do not need

    # One layer is enough; a list of all layers' types would contradict it.
    small = {key: value for key, value in config.items() if key != "layer_types"} | {"num_hidden_layers": 1}
    modules = modules_of(base, small)
    linears = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    return sorted(linears - EMBEDDINGS)


def modules_of(base: str, config: dict[str, Any]) -> dict[str, Any]:
    """The modules, by name, of a model with this configuration, without weights. base: begins an error."""
    import torch  # both take seconds, which few recipes need
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{base} is no language model that transformers knows ({first_line(error)}); take another"
        ) from error
    return dict(model.named_modules())


def check_vocabulary(recipe: Recipe) -> None:
    """UserError for a token that the tokenizer does not have: axolotl would add it, and grow the embeddings."""
    file = recipe.base_folder / "tokenizer.json"
    if not file.is_file():  # a tokenizer of another format; axolotl's own checks come later
        return
    tokenizer, base = Tokenizer.from_file(str(file)), recipe.keys["base_model"]
    named = {f"special_tokens.{key}": value for key, value in (recipe.keys.get("special_tokens") or {}).items()}
    renamed = (recipe.keys.get("added_tokens_overrides") or {}).values()  # reserved tokens under other names
    for key, value in (named | {"eot_tokens": recipe.keys.get("eot_tokens")}).items():
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token not in renamed and tokenizer.token_to_id(token) is None:
                added = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
                near = difflib.get_close_matches(token, added, 1) or added[:3]
                raise UserError(
                    f"{recipe.path}: key '{key}': {token} is no token of {base}; take one that is, {' or '.join(near)}"
                )
    size, count = recipe.base_config.get("vocab_size"), tokenizer.get_vocab_size()
    if size and count > size:
        raise UserError(
            f"{recipe.path}: key 'base_model': {base} has {count} tokens and embeddings for {size}, which training "
            "would not keep; take a model that has one for each"
        )


def check_first_adapter(recipe: Recipe) -> None:
    """UserError where `lora_model_dir` is no adapter folder, or its adapter is not what the recipe's keys say."""
    keys, name = recipe.keys, recipe.keys["lora_model_dir"]
    where = f"{recipe.path}: key 'lora_model_dir'"
    config = read_json(ROOT / name / "adapter_config.json")
    if not isinstance(config, dict) or not (ROOT / name / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{where}: {name} has no adapter_config.json and adapter_model.safetensors; name an adapter's folder"
        )
    for key, theirs in ADAPTER_KEYS.items():
        ours, saved = keys.get(key) or None, config.get(theirs) or None  # left out, they are as 0, false or empty
        if isinstance(ours, list) and isinstance(saved, list):
            ours, saved = sorted(ours), sorted(saved)
        if ours != saved:
            raise UserError(
                f"{where}: {name} has {theirs} {config.get(theirs)}, and key '{key}' is {keys.get(key)}; make them "
                "equal or name another adapter"
            )
    check_first_base(recipe, where, config.get("base_model_name_or_path"))


def check_first_base(recipe: Recipe, where: str, named: str | None) -> None:
    """UserError where the adapter in `lora_model_dir` was trained on another base: equal shapes load in silence.

    named: the base in adapter_config.json. Its weights are known by the checksums in the adapter's run.json, or lie
    here; equal ones may have another name. Of a hub's model that is still to be fetched, the name alone counts.
    """
    name, base = recipe.keys["lora_model_dir"], recipe.keys["base_model"]
    if not named:
        return
    start = (read_json(ROOT / name / "run.json") or {}).get("start", {})
    theirs = start.get(named) or model_files(named, WEIGHTS, ROOT)
    ours = model_files(base, WEIGHTS, ROOT)
    both = sorted(theirs.keys() & ours.keys())
    changed = [file for file in both if theirs[file] != ours[file]]
    same_name = named == base or (ROOT / named).resolve() == (ROOT / base).resolve()
    if changed or not (same_name or any(file.endswith(".safetensors") for file in both)):
        other = f", whose {', '.join(changed[:3])} differ" if changed else ""
        raise UserError(
            f"{where}: {name} was trained on {named}, and key 'base_model' is {base}{other}; set base_model to the "
            "model that it was trained on, or name another adapter"
        )
