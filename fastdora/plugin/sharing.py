"""`fastdora_shared_prefixes`: rows that begin with the same tokens meet in packs, and each prefix is computed once."""

import dataclasses
import itertools
import math
import os

import numpy as np
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers import get_dataset_lengths
from torch.utils.data import BatchSampler, Sampler

from fastdora import prefixes
from fastdora.packing import GROUP, IGNORED, PREFIX
from fastdora.plugin.keys import RecipeError

LOG = get_logger("axolotl.fastdora.sharing")


def find(cfg, meta: TrainDatasetMeta) -> TrainDatasetMeta:
    """The datasets with each row's group and prefix as columns, and the number of steps that their packs give."""
    if not cfg.fastdora_shared_prefixes:
        return meta
    train = _with_columns(cfg, meta.train_dataset, "train")
    packed = meta.eval_dataset is not None and cfg.eval_sample_packing is not False
    validation = _with_columns(cfg, meta.eval_dataset, "validation") if packed else meta.eval_dataset
    world = int(os.environ.get("WORLD_SIZE", 1))
    steps = math.ceil(len(Packs(cfg, train)) / (world * cfg.gradient_accumulation_steps))
    total = math.ceil(steps * cfg.num_epochs)
    return dataclasses.replace(meta, train_dataset=train, eval_dataset=validation, total_num_steps=total)


# A row's copy of its prefix's keys and values saves the second attention, and costs memory and its own gradients: up to
# so many keys a token of a pack they are copied (1.8 for sentiment rows, 4 for FiNER's, 9 for XBRL's).
MOST_COPIES = 3
DRAWS = 3  # an epoch's packs are as many as the largest of so many draws needs


def install(cfg, trainer) -> bool:
    """Let an axolotl trainer draw packs whose rows share prefixes; whether a row gets a copy of its prefix's keys."""
    if not cfg.fastdora_shared_prefixes:
        return False

    packs = Packs(cfg, trainer.train_dataset)

    def sampler(base_sampler: Sampler, dataset) -> Packs:
        return packs if dataset is trainer.train_dataset else Packs(cfg, dataset, shuffled=False)

    trainer._create_multipack_sampler = sampler
    return packs.lengths.sum() <= MOST_COPIES * len(packs) * packs.capacity


def _with_columns(cfg, dataset, split: str):
    rows, limits = [], []
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
        rows += [np.asarray(ids, dtype=np.int32) for ids in batch["input_ids"]]  # datasets gives eight bytes a token
        for labels in batch["labels"]:
            labelled = np.asarray(labels) != IGNORED
            # The last token of the prompt predicts the first label, and stays with its row.
            limits.append(int(labelled.argmax() if labelled.any() else len(labelled)) - 1)
    shared = prefixes.find(rows, limits, _capacity(cfg), cfg.fastdora_rows_per_prefix)
    groups = int((np.unique(shared.groups) >= 0).sum())
    within = int((shared.groups >= 0).sum())
    LOG.info(f"{split}: {within} of {len(rows)} rows share {groups} prefixes")
    return dataset.add_column(GROUP, shared.groups.tolist()).add_column(PREFIX, shared.lengths.tolist())


def _capacity(cfg) -> int:
    return cfg.sequence_len * cfg.micro_batch_size


class Packs(BatchSampler):
    """Packs as batches of one, drawn by the seed and the epoch: each row once an epoch, in as many packs every epoch.

    Their number does not depend on how many epochs there are, so that a finished run can go on to more.
    The number of packs is a multiple of those of a step, so that every step is whole and has the same packs on any
    number of processes; of the processes' alone, so that all take as many steps, where there are too few rows for that.
    """

    def __init__(self, cfg, dataset, shuffled: bool = True):
        super().__init__(range(len(dataset)), batch_size=1, drop_last=False)
        columns = dataset.select_columns([GROUP, PREFIX]).with_format("numpy")
        self.lengths = np.asarray(get_dataset_lengths(dataset), dtype=np.int64)
        self.shared = prefixes.Shared(np.asarray(columns[GROUP]), np.asarray(columns[PREFIX]))
        self.capacity, self.together = _capacity(cfg), cfg.fastdora_rows_per_prefix
        self.most_rows, self.seed, self.shuffled = cfg.sample_packing_bin_size, cfg.seed or 0, shuffled
        self.world, self.epoch = int(os.environ.get("WORLD_SIZE", 1)), 0
        self.a_step = self.world * cfg.gradient_accumulation_steps if shuffled else self.world
        self.count = self._count()
        if self.count % self.world:
            raise RecipeError(
                f"{cfg.axolotl_config_path}: key 'datasets': {len(dataset)} rows for {self.world} processes; take fewer"
            )

    def _count(self) -> int:
        """Packs of an epoch: the most of a few draws."""
        draws = [self._drawn(0, attempt) for attempt in range(DRAWS if self.shuffled else 1)]
        most = max(map(len, draws))
        multiple = self.a_step if math.ceil(most / self.a_step) * self.a_step <= len(self.lengths) else self.world
        return len(prefixes.split(draws[0], math.ceil(most / multiple) * multiple))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _drawn(self, epoch: int, attempt: int) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, epoch, attempt)) if self.shuffled else None
        return prefixes.pack(self.lengths, self.shared, self.capacity, self.together, self.most_rows, generator)

    def __iter__(self):
        # A draw that needs more packs than an epoch has is drawn again, about one in four.
        draws = (self._drawn(self.epoch, attempt) for attempt in itertools.count())
        packs = next(packs for packs in draws if len(packs) <= self.count)
        return iter([[rows] for rows in prefixes.split(packs, self.count)])

    def __len__(self) -> int:
        return self.count
