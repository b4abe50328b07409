"""Counts the rows and tokens that train: axolotl drops rows, or keeps them without a label, without an error."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.loaders.utils import load_model_config
from axolotl.utils.logging import get_logger

from fastdora.plugin.checksums import add_content, text_files
from fastdora.plugin.keys import RecipeError

LOG = get_logger("axolotl.fastdora.rows")


def load(cfg) -> TrainDatasetMeta:
    """Axolotl's own loading, with a cache keyed by the files' content, and every row accounted for.

    Raises RecipeError when rows of the data files would not train, unless the recipe itself sets
    `excess_length_strategy` to drop or truncate.
    """
    splits = ("train", cfg.datasets), ("validation", cfg.test_datasets)
    expected = {split: _count_rows(cfg, files or []) for split, files in splits}  # first: a file may vanish meanwhile
    cfg.dataset_prepared_path = str(_content_addressed(cfg))
    try:
        meta = load_datasets(cfg=cfg)
    except ValueError as error:
        remedies = {  # by words of axolotl's messages (0.19.0)
            "longer than": "'sequence_len': {}; raise it, or set excess_length_strategy: drop to leave those rows out",
            "exceed": "'sequence_len': {}; raise it, or set excess_length_strategy: drop to leave those rows out",
            "too small for sample_packing": "'eval_sample_packing': the validation rows fill no pack; set it to false",
        }
        first = str(error).partition("\n")[0]
        text = next((text for words, text in remedies.items() if words in first.lower()), "'datasets': {}")
        raise RecipeError(f"{cfg.axolotl_config_path}: key {text.format(first)}") from error
    for (split, files), dataset in zip(splits, (meta.train_dataset, meta.eval_dataset), strict=True):
        if files and dataset is not None:
            _account(cfg, split, expected[split], dataset)
    return meta


def _content_addressed(cfg) -> Path:
    # Axolotl's cache key leaves out the files' content, the seed and the length strategy: stale rows would train.
    digest = hashlib.sha256()
    for path in [Path(entry["path"]) for entry in [*(cfg.datasets or []), *(cfg.test_datasets or [])]]:
        digest.update(f"{path}\0".encode())
        if path.is_file():
            add_content(digest, path)
    for key in ("seed", "sequence_len", "excess_length_strategy", "base_model", "chat_template", "chat_template_jinja"):
        digest.update(f"{key}={cfg[key]}\0".encode())
    digest.update(json.dumps(text_files(cfg)).encode())  # of the tokenizer, and of a template in a file of its own
    parent = Path(cfg.dataset_prepared_path or "last_run_prepared")
    if re.fullmatch("[0-9a-f]{16}", parent.name):
        parent = parent.parent
    own = parent / digest.hexdigest()[:16]
    if cfg.is_preprocess and parent.is_dir():
        for old in parent.iterdir():
            if re.fullmatch("[0-9a-f]{16}", old.name) and old != own:
                shutil.rmtree(old)
    return own


def _account(cfg, split: str, expected: int, dataset) -> None:
    tokens = answer = empty = longest = 0
    for batch in dataset.select_columns(["labels"]).with_format("numpy").iter(batch_size=1000):
        for labels in batch["labels"]:
            kept = int(np.count_nonzero(np.asarray(labels) != -100))
            tokens, answer, empty = tokens + len(labels), answer + kept, empty + (kept == 0)
            longest = max(longest, len(labels))
    missing = expected - len(dataset) + empty
    if missing and cfg.excess_length_strategy not in ("drop", "truncate"):
        raise RecipeError(
            f"{cfg.axolotl_config_path}: {missing} of {expected} {split} rows would not train (no answer, or longer "
            f"than sequence_len {cfg.sequence_len}); fix the rows or set excess_length_strategy: drop"
        )
    positions = getattr(load_model_config(cfg), "max_position_embeddings", None)
    if positions and longest > positions:  # of a pack each row counts alone
        raise RecipeError(
            f"{cfg.axolotl_config_path}: key 'sequence_len': a {split} row has {longest} tokens, and {cfg.base_model} "
            f"{positions} positions; set it to {positions} or less, or take a base model that has more"
        )
    left_out = f", {missing} left out as excess_length_strategy says" if missing else ""
    LOG.info(f"{split}: {len(dataset)} rows, {tokens} tokens, {answer} of them answers{left_out}")


def _count_rows(cfg, files: list) -> int:
    """Lines of the data files; RecipeError for one that is not here, so that nobody could say what of it trains."""
    count = 0
    for entry in files:
        try:
            with open(entry["path"], "rb") as file:
                count += sum(1 for line in file if line.strip())
        except OSError as error:
            raise RecipeError(
                f"{cfg.axolotl_config_path}: key 'datasets': {entry['path']} cannot be read ({error.strerror}); name a "
                "file of rows that is there"
            ) from error
    return count
