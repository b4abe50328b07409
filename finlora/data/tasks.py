"""The table of tasks, data/tasks.yaml, as records; the comment at its top says what each key means."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import MinLen, Predicate
from pydantic import PositiveInt, PrivateAttr, ValidationInfo, field_validator

from finlora.core.errors import UserError, did_you_mean
from finlora.core.paths import ROOT
from finlora.core.tables import Record, expecting, read_entry, read_table

TABLE = ROOT / "data" / "tasks.yaml"
OWN_TABLE = ROOT / "data" / "own_tasks.yaml"  # of the user's own, where there is one
Metric = Literal["accuracy_f1", "tag_accuracy_f1", "accuracy", "bertscore_f1"]
INHERITED = ("labels", "metric", "max_new_tokens", "licence", "source")  # by a test set from its task


def _lies_in_raw(path: str) -> bool:
    parts = Path(path).parts
    return bool(parts) and parts[0] in ("train", "test") and ".." not in parts


DataPath = Annotated[str, Predicate(_lies_in_raw), expecting("a path under train/ or test/")]
# An unquoted Yes or No is a boolean in YAML.
Labels = Annotated[
    Annotated[list[str], MinLen(1), Predicate(lambda labels: len(set(labels)) == len(labels))] | None,
    expecting("a list of different strings, or null; quote each one"),
]
MetricName = Annotated[Metric, expecting(f"one of {', '.join(get_args(Metric))}")]
Tokens = Annotated[PositiveInt, expecting("a number of tokens, at least 1")]
Rows = Annotated[int | None, expecting("a number of rows")]


class TestSet(Record):
    """One test set: `file` lies under data/raw; `source_counts` are the label counts that its source documents."""

    file: DataPath
    rows: Rows = None
    rows_about: Rows = None
    labels: Labels
    metric: MetricName
    max_new_tokens: Tokens
    licence: str
    source: str
    source_counts: dict[str, int] | None = None
    _task: str = PrivateAttr("")

    @field_validator("source_counts", mode="before")
    @classmethod
    def _counts_of_its_labels(cls, counts: Any, info: ValidationInfo) -> Any:
        labels = info.data.get("labels")
        if counts is not None and (not isinstance(counts, dict) or set(counts) - set(labels or counts)):
            raise ValueError(f"its labels must be among {labels}")
        return counts

    @property
    def task(self) -> str:
        """The name of the task that it belongs to."""
        return self._task


def unlisted_set(record: dict[str, Any]) -> TestSet:
    """A test set that an earlier result has (its set.json) and data/tasks.yaml no longer lists."""
    return TestSet.model_construct(**{"file": None, "labels": None, "metric": None} | record)


class _Common(Record):
    about: str
    released: Annotated[bool, expecting("true or false")]
    own: bool = False  # the user's (`make task`)
    train: DataPath
    train_rows: Rows = None
    train_rows_about: Rows = None
    licence: str
    source: str


class Task(_Common):
    """A task with a train file and test sets of its own."""

    mixture_of: ClassVar[tuple[str, ...]] = ()
    published_rows: ClassVar[None] = None
    tokens_about: int | None = None
    packed_tokens_about: int | None = None
    labels: Labels
    metric: MetricName
    max_new_tokens: Tokens
    tests: dict[str, TestSet]

    def row_tokens(self, shared: bool) -> int | None:
        """Tokens of a train row, on average; shared: those that it adds to a pack whose rows share prefixes."""
        return self.packed_tokens_about if shared and self.packed_tokens_about else self.tokens_about

    @field_validator("tests", mode="before")
    @classmethod
    def _inherit(cls, tests: Any, info: ValidationInfo) -> Any:
        if not isinstance(tests, dict) or not tests:
            raise ValueError("give at least one test set by name")
        inherited = {key: info.data[key] for key in INHERITED if key in info.data}
        return {name: inherited | test if isinstance(test, dict) else test for name, test in tests.items()}


class Mixture(_Common):
    """Several tasks trained as one: it has their test sets, no labels, and the longest of their max_new_tokens."""

    mixture_of: Annotated[list[str], expecting("a list of tasks")]
    published_rows: Annotated[Literal["smallest", "largest"], expecting("smallest or largest")] = "largest"
    labels: ClassVar[None] = None
    metric: ClassVar[None] = None
    _parts: tuple[Task, ...] = PrivateAttr(())

    @property
    def tests(self) -> dict[str, TestSet]:
        return {name: test for part in self._parts for name, test in part.tests.items()}

    @property
    def max_new_tokens(self) -> int:
        return max(part.max_new_tokens for part in self._parts)


@cache
def load_tasks(path: Path = TABLE) -> dict[str, Task | Mixture]:
    """Every task of the table by name, and the user's own after them; paths in it are relative to data/raw.

    A test set has its task's labels, metric, max_new_tokens, licence and source where it does not state its own.
    Raises UserError that names the file and the key for an unknown, missing or wrong key.
    """
    table = {}
    for file in [path, OWN_TABLE] if path == TABLE and OWN_TABLE.exists() else [path]:
        for name, entry in read_table(file, "tasks").items():
            mixed = isinstance(entry, dict) and "mixture_of" in entry
            table[name] = read_entry(file, name, entry, Mixture if mixed else Task)
    for name, task in table.items():
        if isinstance(task, Task):
            for test in task.tests.values():
                test._task = name
            continue
        for part in task.mixture_of:
            if not isinstance(table.get(part), Task):
                raise UserError(f"{path}: {name}: mixture_of: {part!r} is not a single task of the table")
        task._parts = tuple(table[part] for part in task.mixture_of)
    return table


def task(name: str, path: Path = TABLE) -> Task | Mixture:
    """One task of the table; a name that it does not hold raises UserError with the nearest one."""
    table = load_tasks(path)
    if name not in table:
        hint = did_you_mean(name, table) or f"choose one of {', '.join(table)}"
        raise UserError(f"{path.name} has no task {name!r}: {hint.strip()}")
    return table[name]
