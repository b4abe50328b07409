"""Publish a trained adapter, or its merged model, on the Hugging Face Hub with a model card (`make publish`).

finlora publish --recipe sentiment_r8_dora --repo name/model [--merged] [--private] [--push]

Without --push nothing leaves this machine: the card is written, and the files that would be pushed are listed. They are
weights, configuration and tokenizer, the names in FILES; checkpoints, logs and run.json stay. The token comes from
HF_TOKEN alone.
"""

import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from fastdora.plugin.safety import SECRET_VALUE
from finlora.core import html
from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError
from finlora.core.files import read_json, replacing
from finlora.core.paths import MACHINE_PATH, ROOT, is_machine_path, public_name, shown
from finlora.data.corrections import load_corrections
from finlora.data.tasks import load_tasks
from finlora.evaluate import report, results
from finlora.export.merged import check_weights, need_merged, read_merge_record
from finlora.models.trained import TrainedModel
from finlora.recipes.bases import find_base

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
DEFECTS = ROOT / "data" / "README.md"
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
FILES = {
    "adapter": ["adapter_config.json", "adapter_model.safetensors", *TOKENIZER],
    "merged": [
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        *TOKENIZER,
    ],
}
CONFIGS = ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json")
BASES = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # keys that may name a folder
# The names of the test sets in data/README.md's table of defects.
DEFECT_NAMES = {
    "fpb": "FPB",
    "fiqa": "FiQA",
    "tfns": "TFNS",
    "nwgi": "NWGI",
    "xbrl_term": "xbrl_term",
    "xbrl_extract_tags": "XBRL contexts",
    "financebench": "FinanceBench",
    "formula": "Financial Math",
}


def publish(
    trained: TrainedModel, repo: str, merged: bool = False, private: bool = False, push: bool = False
) -> list[str]:
    """Write the card, list the files to publish, and with `push` push them; return their names.

    private: where the repository is new. Raises UserError in one line.
    """
    check_repo(repo)
    token = os.environ.get("HF_TOKEN", "").strip()
    if push and not token:
        raise UserError(
            "HF_TOKEN is not set; make a token that may write at huggingface.co/settings/tokens, and set it"
        )
    folder = need_merged(trained) if merged else trained.adapter
    if merged:
        check_weights(folder)
    known = find_base(trained.run.keys["base_model"])
    licence = known.licence if known else None
    llama = llama_licence(licence) if licence and licence.startswith("llama") else None
    content = model_card(trained, repo, folder if merged else None, licence, llama)
    card = trained.folder / "publish" / "README.md"
    with replacing(card) as file:
        file.write(content)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        names = stage(folder, FILES["merged" if merged else "adapter"], content, llama, staged)
        print(f"card      {shown(str(card))}")
        for note in notes(trained, repo, content, llama):
            print(f"note      {note}")
        print(f"{'pushing' if push else 'would push'} to {repo}{' (private)' if private else ''}:")
        for name in names:
            print(f"  {name:<32}{(staged / name).stat().st_size / 1e6:>12.3f} MB")
        if push:
            print(f"published {upload(repo, staged, names, private, token, trained.name)}")
        else:
            print("nothing was pushed; PUSH=1 pushes")
    return names


def stage(folder: Path, patterns: list[str], card: str, llama: dict[str, str] | None, staged: Path) -> list[str]:
    """Put what is published into `staged`, weights as links; return the names, after `check_text` of each."""
    (staged / "README.md").write_text(card, encoding="utf-8")
    if llama:
        (staged / "NOTICE.txt").write_text(f"{llama['notice']}\n", encoding="utf-8")
    names = sorted(path.name for path in staged.iterdir())
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.name in CONFIGS:
            config = without_paths(json.loads(path.read_text(encoding="utf-8")))
            (staged / path.name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            (staged / path.name).symlink_to(path.resolve())
        names.append(path.name)
    make_compatible(staged)  # adapters of before 2026-11, and from elsewhere
    for name in names:
        if name.endswith(".safetensors"):
            with safe_open(staged / name, "pt") as tensors:
                check_text(name, json.dumps(tensors.metadata()).encode())
        else:
            check_text(name, (staged / name).read_bytes())
    return names


def without_paths(value: Any) -> Any:
    """A configuration in which a path of this machine is reduced to its last part."""
    if isinstance(value, dict):
        bases = {key: public_name(value[key]) for key in BASES if isinstance(value.get(key), str)}
        return {key: without_paths(one) for key, one in value.items()} | bases
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    return Path(value).name if isinstance(value, str) and is_machine_path(value) else value


def notes(trained: TrainedModel, repo: str, card: str, llama: dict[str, str] | None) -> list[str]:
    """What is left to do by hand before the model is pushed."""
    left = []
    if llama and not repo.split("/")[1].startswith("Llama"):
        left.append(f"Llama's licence wants the model's name to begin with Llama: {repo.replace('/', '/Llama-')}")
    if llama:
        left.append("Llama's licence also wants a copy of itself beside the weights: add it on the Hub")
    if "\nNot evaluated" in card:
        left.append(f"the card has no scores: run `make eval {trained.options} BASE=1` first")
    return left


def check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError as error:
        raise UserError(
            f"REPO={repo}: is not <user or organisation>/<model>; letters, digits, '-', '_' and '.', at most 96 in all"
        ) from error


def check_text(name: str, content: bytes) -> None:
    """UserError where a file to publish contains what looks like a secret, or a path of this machine.

    tokenizer.json may have words that look like paths: in it this checkout and HOME are looked for alone.
    """
    text = content.decode("utf-8", "replace")
    token = os.environ.get("HF_TOKEN", "").strip()
    if SECRET_VALUE.search(text) or (token and token in text):
        raise UserError(f"{name}: holds what looks like a secret; remove it before it is published")
    # HOME is / in a container whose user has no account.
    known = [path for path in (str(ROOT), f"{Path.home()}/") if path in text and path != "//"]
    other = MACHINE_PATH.search(text) if name != "tokenizer.json" else None
    if known or other:
        path = known[0] if known else other[0]
        raise UserError(f"{name}: holds a path of this machine ({path}); remove it before it is published")


def upload(repo: str, folder: Path, names: list[str], private: bool, token: str, run: str) -> str:
    """One commit with the named files of `folder`; the model's address. Weights that the Hub has are not sent again."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message=f"{run}: weights, tokenizer and card",
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"REPO={repo}: {reason(error).replace(token, '***')}") from error
    return str(url)


def reason(error: BaseException) -> str:
    """What went wrong with the Hub and what to do, in one line."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if not isinstance(error, HfHubHTTPError):
        return (
            f"the Hub cannot be reached or broke off ({' '.join(str(error).split())[:120]}); run the same command again"
        )
    status = error.response.status_code
    message = " ".join((error.server_message or "").split())[:120]
    answer = f"{status}{f', {message}' if message else ''}"
    if status == 401:
        return f"the Hub does not accept HF_TOKEN ({answer}); make one that may write at huggingface.co/settings/tokens"
    if status in (403, 404):
        return f"HF_TOKEN may not write there ({answer}); name a repository of yours, or a token with write access"
    if status == 429 or status >= 500:
        return f"the Hub answers {answer}; wait a little and run the same command again"
    return f"the Hub refuses ({answer})"


def llama_licence(licence: str) -> dict[str, str]:
    """What Meta asks for beside a model made of one of its own. licence: the Hub's identifier, as llama3.1."""
    version = licence.removeprefix("llama")
    name = f"Llama {version} Community License"
    return {
        "name": name,
        "url": f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
        "notice": f"Llama {version} is licensed under the {name}, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.",
    }


def model_card(
    trained: TrainedModel, repo: str, merged: Path | None, licence: str | None, llama: dict[str, str] | None
) -> str:
    """The card: how to load it, prompt, data with its defects, scores, recipe, versions, licences.

    licence: the base model's, by the Hub's identifier, where it is known. llama: `llama_licence` where it is Meta's.
    """
    record, recipe = trained.run.record, trained.run.keys
    task = next((part for part in Path(recipe["datasets"][0]["path"]).parts if part in load_tasks()), "sentiment")
    entry = load_tasks()[task]
    parts = entry.mixture_of or [task]
    tests = entry.tests
    base = public_name(recipe["base_model"])
    sources = [load_tasks()[part].source for part in parts] + [test.source for test in tests.values()]
    files = [load_tasks()[part].train for part in parts] + [test.file for test in tests.values()]
    hub = "https://huggingface.co/datasets/"
    rows = prepared(record)
    names = sorted({source.removeprefix(hub) for source in sources if source.startswith(hub)}) or None
    data = ModelCardData(
        language="en",
        license=licence or "other",
        license_name=None if licence else "that-of-the-base-model",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=base if base == recipe["base_model"] else None,
        datasets=names if record["data_from"] == "raw" and not (rows and rows["settings"]["file"]) else None,
        tags=["finance", "finlora", "axolotl", trained.facts.method],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo=repo,
        name=repo.split("/")[1],
        trained=trained,
        base=base,
        merged=read_merge_record(merged) if merged else None,
        llama=llama,
        recipe_text=(trained.adapter / "recipe.yaml").read_text(encoding="utf-8").strip(),
        method=report.METHODS[trained.facts.method],
        record=record,
        entry=entry,
        task=task,
        trained_on={part: load_tasks()[part] for part in parts},
        tests=tests,
        prepared=rows,
        defects=defects(tests),
        corrections={file: load_corrections()[file] for file in files if file in load_corrections()},
        # A sweep keeps its points' evaluations beside them.
        evaluations=evaluations(trained.facts.sha256, results.RESULTS, trained.folder.parent / "results"),
        facts=report.facts,
        notes=report.notes,
        percent=html.percent,
        signed=html.signed,
        metrics=record["metrics"],
    )
    return text_without_paths(card.content.strip() + "\n", recipe)


def text_without_paths(text: str, recipe: dict[str, Any]) -> str:
    """The text with each path of this machine reduced to its last part, or to what lies below this checkout.

    recipe: its values are known to be paths where they begin like one, spaces included.
    """
    values = [recipe, *(recipe.get("datasets") or []), *(recipe.get("test_datasets") or [])]
    known = [value for keys in values for value in keys.values() if isinstance(value, str) and is_machine_path(value)]
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    text = text.replace(f"{ROOT}/", "")
    return MACHINE_PATH.sub(lambda path: re.split(r"[/\\]+", path[0].rstrip("/\\"))[-1], text)


def prepared(record: dict[str, Any]) -> dict[str, Any] | None:
    """prepared.json of the rows that were trained on; None where they were prepared elsewhere, or again since."""
    for name, digest in record["data"].items():
        about = read_json((ROOT / name).parent / "prepared.json")
        if about and about.get("outputs", {}).get(Path(name).name) == digest:
            return about
    return None


def defects(tests: dict[str, Any]) -> list[tuple[str, str]]:
    """(defect, what is done about it) from data/README.md's table: those of all data, and of these test sets."""
    ours = {DEFECT_NAMES[name] for name in tests if name in DEFECT_NAMES}
    rows = []
    for line in DEFECTS.read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 6 and cells[1].strip().isdigit():
            defect, done = cells[2].strip(), cells[4].strip()
            named = {name for name in DEFECT_NAMES.values() if name in defect}
            if not named or named & ours:
                rows.append((defect, re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", done)))  # links lead nowhere on the Hub
    return rows


def evaluations(sha256: str, *folders: Path) -> list[report.Model]:
    """Those of the adapter with these weights that these folders of results have."""
    evaluated = {}
    for folder in folders:
        with suppress(UserError):  # nothing is evaluated there
            evaluated |= results.read(folder)[0]
    models = report.with_bases(evaluated)
    return [model for model in models if model.results.run.adapter_sha256 == sha256 and model.results.sets]
