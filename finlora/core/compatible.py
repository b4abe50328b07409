"""Saved models and tokenizers that other versions read as this one does: transformers 4, vLLM, llama.cpp.

transformers 5 renamed what it writes. Version 4 ignores the new names in silence, and a Llama 3 then runs with its
default rope_theta of 10,000 instead of 500,000; or it fails to load the tokenizer. Both names are written here.
"""

import json
from pathlib import Path
from typing import Any

from finlora.core.files import read_json, replacing

IN_ROPE = ("partial_rotary_factor", "original_max_position_embeddings")  # version 4 reads them beside rope_scaling


def make_compatible(folder: Path) -> None:
    """Add version 4's names to config.json and tokenizer_config.json of `folder`, as far as it has them."""
    for name, older in (("config.json", older_config), ("tokenizer_config.json", older_tokenizer_config)):
        path = folder / name
        if config := read_json(path):
            added = older(config, folder)
            if added != config:
                with replacing(path) as file:
                    file.write(json.dumps(added, indent=2, ensure_ascii=False) + "\n")


def older_config(config: dict[str, Any], _: Path) -> dict[str, Any]:
    """`rope_parameters` as rope_theta and rope_scaling too (transformers before 5.0), `dtype` as torch_dtype (4.56)."""
    older = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = dict(config.get("rope_parameters") or {})
    local = rope.pop("sliding_attention", None)  # Gemma 3 has one rope a kind of layer
    rope = rope.pop("full_attention", rope)
    if local:
        older["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" in rope:
        older["rope_theta"] = rope.pop("rope_theta")
        older |= {key: rope[key] for key in IN_ROPE if key in rope and key not in config}
        older["rope_scaling"] = rope_scaling(rope)
    return config | older


def rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Version 4's form; its Phi 3 takes these three keys and no other."""
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    scaling = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    return None if kind == "default" else scaling


def older_tokenizer_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The class that reads tokenizer.json and additional_special_tokens (before 5.0), chat_template (before 4.43).

    Without is_local and local_files_only, which say how this machine loaded it.
    """
    config = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    older: dict[str, Any] = {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):  # version 4 fails: it takes a dictionary
        config = {key: value for key, value in config.items() if key != "extra_special_tokens"}
        older["additional_special_tokens"] = extra
    template = folder / "chat_template.jinja"
    if template.is_file():
        older["chat_template"] = template.read_text(encoding="utf-8")
    return config | older
