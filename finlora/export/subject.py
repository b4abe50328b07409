"""A trained adapter by its recipe, folder or hub id, and where its merged model lies."""

import logging
from pathlib import Path
from typing import Any

import yaml

from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256
from finlora.core.paths import shown, slug
from finlora.models.load import adapter_facts, resolve_adapter
from finlora.recipes.bases import fetch_base
from finlora.train.runs import OUTPUTS, of_recipe


def subject(recipe: str | None, adapter: str | None, model: str | None, bits: int | None, tiny: bool) -> dict[str, Any]:
    """A trained adapter by its recipe, or by its folder or hub id: base, bits, facts, and where its merged model lies.

    Raises UserError where it is not trained, not whole, or not the one that run.json tells of. Loads no weights.
    """
    if bool(recipe) == bool(adapter) or (recipe and model):
        raise UserError("give RECIPE=<trained recipe>, or ADAPTER=<folder or hub id> and MODEL=<its base>")
    given = f"RECIPE={recipe}{' TINY=1' if tiny else ''}" if recipe else f"ADAPTER={adapter}"
    given += (f" MODEL={model}" if model else "") + (f" BITS={bits}" if bits else "")
    plan: dict[str, Any] = {"given": given, "recipe": None, "record": None, "run": {}, "tiny": False, "sets": []}
    if recipe:
        found = of_recipe(recipe, tiny)
        plan |= {key: found[key] for key in ("recipe", "model", "adapter", "bits", "tiny")}
        plan |= {
            "name": found["recipe"],
            "sets": found["default_sets"],
            "record": read_json(found["adapter"] / "run.json"),
        }
        plan["run"] = yaml.safe_load((found["adapter"] / "recipe.yaml").read_text(encoding="utf-8"))
        plan["folder"] = found["adapter"]
    else:
        folder = resolve_adapter(adapter)
        plan |= {"name": slug(adapter), "adapter": folder, "bits": bits or 16}
        plan["folder"] = OUTPUTS / "adapters" / slug(adapter)  # no recipe has this name
    plan["facts"] = adapter_facts(plan["adapter"])
    if adapter:
        plan["model"] = model or plan["facts"]["base"]
    elif plan["facts"]["sha256"] != plan["record"]["adapter"]["sha256"]:
        again = f"make train {given} FORCE=1"
        raise UserError(
            f"{shown(str(plan['adapter']))}: the adapter is not the one that run.json tells of; run `{again}`"
        )
    if not plan["model"]:
        raise UserError(f"{adapter}: does not say which base it was trained on; name it with MODEL=")
    plan["merged"] = plan["folder"] / "merged"
    return plan


def merged_folder(plan: dict[str, Any]) -> Path | None:
    """The folder with the merged model of this very adapter and base; None where it is not, or not all, there."""
    folder, about = plan["merged"], read_json(plan["merged"] / "merge.json")
    wanted = {"adapter_sha256": plan["facts"]["sha256"], "base": shown(plan["model"]), "trained_bits": plan["bits"]}
    if not about or any(about.get(key) != value for key, value in wanted.items()):
        return None
    return folder if all((folder / name).is_file() for name in about["weights"]) else None


def need_merged(plan: dict[str, Any]) -> Path:
    """The same, or UserError that says what to run."""
    if folder := merged_folder(plan):
        return folder
    state = "does not hold this adapter's model" if (plan["merged"] / "merge.json").is_file() else "is not there"
    raise UserError(f"{shown(str(plan['merged']))}: {state}; run `make merge {plan['given']}`")


def check_weights(folder: Path) -> None:
    """UserError where a merged model's weights are not those that were verified."""
    for name, expected in (read_json(folder / "merge.json") or {})["weights"].items():
        if sha256(folder / name) != expected:
            raise UserError(f"{shown(str(folder / name))}: is not what was verified; merge again with FORCE=1")


def check_base(plan: dict[str, Any]) -> None:
    """UserError where MODEL= is not the base that the adapter names: one of equal shapes would merge in silence."""
    named, given = plan["facts"]["base"], plan["model"]
    if named and given != named and Path(given).resolve() != Path(named).resolve():
        raise UserError(
            f"MODEL={given}: the adapter was trained on {named}; leave MODEL= out, or say FORCE=1 where it is the same "
            "model in another place"
        )


def fetch_model(plan: dict[str, Any]) -> None:
    """Bring the base into the cache, as safetensors and text, and leave the hub alone from there on."""
    called = "key 'base_model'" if plan["recipe"] else "the base, which MODEL= names"
    fetch_base(Path(plan["name"]), {"base_model": plan["model"]}, called)
    without_the_hub()


def without_the_hub() -> None:
    """Before bitsandbytes is imported: it would fetch compiled kernels, or wait for a network that is not there."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    # It warns of its cast to float16 in each layer of each step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
