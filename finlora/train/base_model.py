"""What a recipe asks of its base model, told from configuration and tokenizer before any weights are fetched."""

import difflib
from typing import Any

from tokenizers import Tokenizer

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
    if config.get("tie_word_embeddings") and EMBEDDINGS & set(keys.get("lora_modules_to_save") or []):
        raise UserError(
            f"{path}: key 'lora_modules_to_save': {keys['base_model']} ties its embeddings to its head, and a merged "
            "model would lose one of them; remove it"
        )
    longest = config.get("max_position_embeddings")
    if longest and not keys.get("sample_packing") and keys["sequence_len"] > longest:  # of a pack each row counts alone
        raise UserError(
            f"{path}: key 'sequence_len' is {keys['sequence_len']}, and {keys['base_model']} has {longest} positions; "
            f"set it to {longest} or less"
        )
    layers = recipe.layers if config.get("model_type") == "llama" else []
    layers = layers or layers_of(base, config)
    for target in keys["lora_target_modules"]:
        if target not in layers:
            raise UserError(f"{path}: key 'lora_target_modules': {target} is none of {', '.join(layers)}")


def layers_of(base: str, config: dict[str, Any]) -> list[str]:
    """The linear layers of an architecture's blocks: Phi-3, say, has one for q, k and v. base: begins an error."""
    import torch  # both take seconds, which a Llama does not need
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        # One layer is enough; a list of all layers' types would contradict it.
        small = {key: value for key, value in config.items() if key != "layer_types"} | {"num_hidden_layers": 1}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{base} is no language model that transformers knows ({first_line(error)}); take another"
        ) from error
    linears = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(linears - EMBEDDINGS)


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
        ours, saved = keys.get(key), config.get(theirs)
        if isinstance(ours, list) and isinstance(saved, list):
            ours, saved = sorted(ours), sorted(saved)
        if ours != saved:
            raise UserError(f"{where}: {name} has {theirs} {saved}, and key '{key}' is {ours}; make them equal")
