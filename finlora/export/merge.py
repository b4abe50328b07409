"""Merge a trained adapter into its base: 16-bit safetensors with tokenizer and chat template (`make merge`).

finlora merge --recipe sentiment_r8_dora [--tiny] [--into full] [--limit 100] [--force]
finlora merge --adapter <folder or hub id> [--model <base>] [--bits 8]

Loading, checking the adapter against the base, and merging DoRA are evaluation's (finlora/models/load.py), so what is
merged is what `make eval` scores. axolotl's merge-lora also uses PEFT's layers, but cannot merge into 8-bit weights as
they were in training, rounds embeddings and head to 4 bits with the rest, writes in place and verifies nothing.

An adapter trained on 8- or 4-bit weights learned to correct rounded weights. It can be merged into the base as
published ("full") or into the rounded weights ("dequantised"): both are compared with the model as trained, and the
closer one is taken.
"""

import gc
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from fastdora.plugin.checksums import weights_sha256
from finlora.core.errors import UserError
from finlora.core.files import sha256, write_json
from finlora.core.machine import GIB, gpus
from finlora.core.paths import RAW, ROOT, SAMPLE, existing, shown
from finlora.core.provenance import git_state, versions
from finlora.core.startup import log_to
from finlora.data.test_sets import all_sets
from finlora.evaluate.questions import Questions, named_sets, read_questions, with_length
from finlora.evaluate.scorers import scorings, summary
from finlora.export.merged import MergeRecord, check_weights, is_merged
from finlora.models import load as models
from finlora.models.trained import TrainedModel, disable_hub, fetch_base_model
from finlora.train.runs import TrainedRecipe, folder_lock

SHARD = "5GB"
DIALOGUES = 16  # rows that logits are compared on
# The mean distance of logits, as a share of their spread, that passes without a closer look. Saving in bfloat16 moves
# the demo's logits by 0.2% of it (docs/use.md). A GPU also rounds activations to 16 bits, in another order for merged
# and unmerged weights: hence 5%. Beyond, `verify` measures what one step of bfloat16 does to this very model, because
# some are that sensitive: an 8B shape of random weights moves by 8%.
TOLERANCE = {"cpu": 0.01, "cuda": 0.05}
ON_CPU = "merge on the CPU: CUDA_VISIBLE_DEVICES= make merge ..."
SAMPLE_ROWS = SAMPLE / "test" / "fpb_test.jsonl"


@dataclass(frozen=True)
class Distance:
    """How far logits (positions, vocabulary) are from the expected ones: mean and largest absolute difference."""

    mean: float
    largest: float
    spread: float  # the expected logits' standard deviation over the vocabulary, on average
    same_next_token: float  # share of positions
    of_a_step: float | None = None  # the mean distance that one step of bfloat16 in every weight makes, if measured

    def __str__(self) -> str:
        return f"{self.mean:.2g} on average ({self.largest:.2g} at most, of a spread of {self.spread:.2g})"

    def as_json(self) -> dict[str, float]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """How a merged model differs from the model as trained."""

    distance: Distance
    asked: int  # rows of test sets that both answered
    same_answers: float | None  # share of them; None where none were asked
    score: dict[str, float]  # of the merged model, by test set
    score_difference: dict[str, float]

    def __str__(self) -> str:
        text = f"logits {self.distance} from the trained model"
        if self.asked:
            text += f", {self.same_answers:.1%} of {self.asked} answers the same"
        scores = [f"{name} {self.score[name]:.1%} ({change:+.1%})" for name, change in self.score_difference.items()]
        return text + (f"; score {', '.join(scores)}" if scores else "")

    def as_json(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key != "distance"}
        return self.distance.as_json() | own


@dataclass(frozen=True)
class Responses:
    """What a model makes of the rows: logits, and its answers and accuracy for each test set that was asked."""

    answers: dict[str, list[str]]
    score: dict[str, float]
    logits: torch.Tensor  # (positions, vocabulary), float32, on the CPU


@dataclass(frozen=True)
class MergePlan:
    """A merge that passed its checks: what it is made of, and what it is compared with the trained model on."""

    trained: TrainedModel
    tokenizer: Any
    record: MergeRecord  # what is known before merging
    dialogues: list[list[int]]  # tokens of rows that logits are compared on
    questions: list[Questions]  # of the test sets that are present; none where no answers are compared


def run(
    trained: TrainedModel, into: str | None = None, limit: int = 100, prompt: str = "saved", force: bool = False
) -> Path:
    """Merge, unless that is done, and return the merged model's folder. Options are as in `prepare`."""
    if not force and is_merged(trained, into):
        with folder_lock(trained.folder):
            check_weights(trained.merged)
        print(f"{shown(trained.merged)} is already merged from this adapter; FORCE=1 merges again")
    else:
        merge(prepare(trained, into, limit, prompt, force))
    return trained.merged


def prepare(trained: TrainedModel, into: str | None, limit: int, prompt: str, force: bool) -> MergePlan:
    """All checks and all reading: a merge that is refused leaves nothing.

    into: "full" or "dequantised"; without it the one closer to the model as trained. limit: rows of each test set
    present that both are asked, 0 for none. Raises UserError.
    """
    if into == "dequantised" and trained.bits == 16:
        raise UserError(f"INTO=dequantised: {trained.name} was trained on 16 bits; there is nothing to dequantise")
    fetch_base_model(trained, force)
    disable_hub()
    parameters = models.check_fits(trained.adapter, trained.facts, trained.base_model)
    tokenizer = models.load_tokenizer(trained.base_model, trained.adapter, prompt)
    check_room(trained.folder, parameters)
    record = MergeRecord(
        adapter=shown(trained.adapter),
        adapter_sha256=trained.facts.sha256,
        base=shown(trained.base_model),
        base_sha256=weights_sha256(trained.base_model, ROOT),
        method=trained.facts.method,
        r=trained.facts.r,
        alpha=trained.facts.alpha,
        trained_bits=trained.bits,
        asked_for=into,
        template_sha256=models.template_sha256(tokenizer),
        versions=versions(),
        git=git_state(),
    )
    rows = read_dialogues(trained, tokenizer)
    questions = read_test_sets(trained.run, tokenizer, limit) if limit else []
    return MergePlan(trained, tokenizer, record, rows, questions)


def read_dialogues(trained: TrainedModel, tokenizer) -> list[list[int]]:
    """Tokens of the shortest of the recipe's own validation rows, or of the sample's where those are missing."""
    own = [ROOT / entry["path"] for entry in trained.run.keys.get("test_datasets") or []]
    path = next((path for path in own if path.is_file() and path.stat().st_size), SAMPLE_ROWS)
    turns = []
    with path.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(16 * DIALOGUES), strict=False):
            row = json.loads(line)
            turns.append(
                row.get("messages")
                or [{"role": "user", "content": row["context"]}, {"role": "assistant", "content": str(row["target"])}]
            )
    tokens = [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in turns]
    return sorted(tokens, key=len)[:DIALOGUES]


def read_test_sets(recipe: TrainedRecipe, tokenizer, limit: int) -> list[Questions]:
    """The recipe's test sets that are present; of a tiny run the sample's where none is fetched."""
    files = {name: all_sets()[name].file for name in named_sets(recipe.task or "")}
    folder = SAMPLE if recipe.tiny and not any((RAW / file).is_file() for file in files.values()) else RAW
    names = [name for name, file in files.items() if (folder / file).is_file()]
    return [with_length(read_questions(name, folder, limit=limit), "whole", tokenizer) for name in names]


def check_room(folder: Path, parameters: int) -> None:
    """UserError where the merged model does not fit on the disk, or the base in 16 bits (32 on a CPU) in memory.

    The factors leave room beside the weights: 5% for tokenizer and file headers, 15% for one layer's update and norm.
    """
    size = 2 * parameters / GIB
    free = shutil.disk_usage(existing(folder)).free / GIB
    if free < size * 1.05:
        raise UserError(f"{folder}: the merged model takes {size:.1f} GiB and {free:.1f} are free; free some")
    memory, free, remedy = "memory", psutil.virtual_memory().available / GIB, "take a larger machine"
    if cards := gpus():
        name, _, free = cards[0]
        memory, remedy = f"GPU memory ({name})", f"free it, or {ON_CPU}"
    needed = size * (1.15 if cards else 2.15)
    if free < needed:
        raise UserError(f"merging takes {needed:.0f} GiB of {memory} and {free:.0f} are free; {remedy}")


def merge(plan: MergePlan) -> None:
    """Merge, and verify the saved model against base and adapter; merge.json beside it holds the report.

    The folder is written beside its place and renamed once it is verified, so a failure leaves nothing behind.
    """
    out = plan.trained.merged
    with folder_lock(plan.trained.folder):
        log_to(plan.trained.folder / "merge.log")
        for leftover in out.parent.glob(".merged-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merged-") as beside:
            folder = Path(beside) / "merged"
            try:
                verified = write(plan, folder)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{plan.trained.name}: the GPU is out of memory; free it, or {ON_CPU}") from error
            folder.chmod(0o755)  # TemporaryDirectory's own is 0o700
            if out.exists():
                out.rename(Path(beside) / "before")
            folder.rename(out)
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    print(
        f"verified  logits of the saved model: {verified} from base and adapter\n"
        f"merged    {shown(out)} ({sum(sizes) / 1e9:.2f} GB in {len(sizes)} file{'s' * (len(sizes) > 1)})"
    )


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Errors of the disk as UserError; safetensors wraps the operating system's error in one of its own."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "os error" in str(error))):
            raise
        raise UserError(
            f"{shown(out)}: cannot be written ({' '.join(str(error).split())[:120]}); free some space"
        ) from error


def write(plan: MergePlan, folder: Path) -> Distance:
    """Merge into the closer weights, save the model to `folder`, verify what was saved, and write merge.json."""
    trained, tokenizer, rows = plan.trained, plan.tokenizer, plan.dialogues
    merged, expected, choice = merge_closest(plan)
    with disk_errors(trained.merged):
        for tensor in merged.parameters():
            tensor.data = tensor.data.to(torch.bfloat16)
        models.save(merged, tokenizer, folder, trained.eot_tokens, SHARD)
        del merged  # before the saved model is loaded
        collect()
        check_tokenizer(trained, tokenizer, folder, rows)
        verified = verify(models.load_base(str(folder), 16), rows, expected, trained.adapter)
        weights = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
        record = replace(plan.record, **choice, dialogues=len(rows), verified=verified.as_json(), weights=weights)
        write_json(folder / "merge.json", asdict(record))
    return verified


def merge_closest(plan: MergePlan):
    """The merged model, the logits to expect of it, and MergeRecord's fields on the choice of weights merged into.

    One model is in memory at a time, so the choice that was not merged last is merged again.
    """
    trained, into = plan.trained, plan.record.asked_for
    print(f"merging   {trained.name}: {trained.facts.method}, r {trained.facts.r}, trained on {trained.bits} bits")
    if trained.bits == 16:  # there is nothing to choose, and the model as trained is what `verify` compares with
        return *fold(plan, "full"), {"into": "full"}
    reference = ask(models.as_trained(trained), plan)
    collect()
    choices = [into] if into else ["full", "dequantised"]
    merged, comparisons = None, {}
    for choice in choices:
        merged = None
        collect()
        merged, expected = fold(plan, choice)
        comparisons[choice] = compare(ask(merged, plan), reference)
        print(f"{choice:<12}{comparisons[choice]}", flush=True)
    closest = min(comparisons, key=lambda choice: comparisons[choice].distance.mean)
    if closest != choices[-1]:
        merged = None
        collect()
        merged, expected = fold(plan, closest)
    if len(choices) > 1:
        other = next(choice for choice in choices if choice != closest)
        print(f"taking    {closest}, the closer to the model as trained")
        print(f"          make merge {trained.options} INTO={other} takes the other")
    from_trained = {choice: comparison.as_json() for choice, comparison in comparisons.items()}
    return merged, expected, {"into": closest, "from_trained": from_trained, "trained_score": reference.score}


def fold(plan: MergePlan, into: str):
    """(the base with the adapter merged into its weights, the logits of base and adapter before).

    DoRA: W' = m (W + s B A) / ||W + s B A||, the norm of each row; LoRA: W' = W + s B A. Both are computed in float32
    and then rounded to bfloat16, which is what is saved: `ask` then measures the model that users get.
    """
    from peft import PeftModel  # late: it imports bitsandbytes, see disable_hub

    trained = plan.trained
    base = models.load_base(trained.base_model, 16 if into == "full" else trained.bits)
    unmerged = PeftModel.from_pretrained(base, trained.adapter).eval()
    expected = models.logits(unmerged, plan.dialogues)
    merged = models.attach(unmerged.unload(), trained.adapter)
    for tensor in merged.parameters():  # not .to(): buffers (rotary frequencies) stay float32
        tensor.data = tensor.data.to(torch.bfloat16).to(tensor.dtype)
    return merged, expected


def check_tokenizer(trained: TrainedModel, tokenizer, folder: Path, rows: list[list[int]]) -> None:
    """UserError where the saved tokenizer makes other tokens of the rows' texts.

    AutoTokenizer (transformers 5) takes the class that belongs to config.json's model_type for some models, such as
    Qwen2's, whatever class the tokenizer has.
    """
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in tokenizer.batch_decode(rows):
        if saved(text, add_special_tokens=False)["input_ids"] != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"{trained.adapter}: its tokenizer is not the one that transformers takes for {trained.base_model}: it "
                "would make other tokens of the same text; train on a base with a tokenizer of its own kind"
            )


def verify(saved, rows: list[list[int]], expected: torch.Tensor, adapter: Path) -> Distance:
    """The distance of a saved model's logits from the expected ones; `saved` may be changed in place.

    Where it is over TOLERANCE, `of_a_step` is measured too: every weight goes one step of bfloat16 up or down at
    random, twice the most that rounding changes it by. A model that is no further off than that is sensitive to
    rounding; one that is further off is wrongly merged, a UserError.
    """
    actual = models.logits(saved, rows)
    verified = distance(actual, expected)
    if verified.mean <= TOLERANCE[saved.device.type] * verified.spread:
        return verified
    for tensor in saved.parameters():
        rounded = tensor.data.to(torch.bfloat16)
        towards = torch.where(torch.rand_like(tensor.data, dtype=torch.float32) < 0.5, math.inf, -math.inf)
        tensor.data = torch.nextafter(rounded, towards.to(torch.bfloat16)).to(tensor.dtype)
    verified = replace(verified, of_a_step=distance(models.logits(saved, rows), actual).mean)
    if not verified.mean <= verified.of_a_step:  # not `>`: logits that are no numbers must not pass
        raise UserError(
            f"{adapter}: merged, its logits are {verified} from those of base and adapter, more than the "
            f"{verified.of_a_step:.2g} of a rounding of its weights; nothing was written, please report this"
        )
    return verified


def ask(model, plan: MergePlan) -> Responses:
    """The model's answers to the questions with its score on each test set, and its logits."""
    texts, scores = {}, {}
    if plan.questions:
        from finlora.evaluate import asking, harness  # late: they import lm_eval, which takes seconds, and bitsandbytes

        lm = harness.BatchedHFLM(model, plan.tokenizer, eot_tokens=plan.trained.eot_tokens)
    for questions in plan.questions:
        name = questions.name
        _, rows = asking.answers(lm, questions)
        texts[name] = [row["answer"] for row in rows]
        if scorers := scorings(name, all_sets()[name]):
            primary = next(iter(scorers.values()))
            scores[name] = summary(primary(texts[name], [row["corrected"] for row in rows]))["accuracy"]
    return Responses(texts, scores, models.logits(model, plan.dialogues))


def distance(actual: torch.Tensor, expected: torch.Tensor) -> Distance:
    apart = (actual - expected).abs()
    return Distance(
        mean=apart.mean().item(),
        largest=apart.max().item(),
        spread=expected.std(-1).mean().item(),
        same_next_token=(actual.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    )


def compare(merged: Responses, trained: Responses) -> Comparison:
    same = [
        ours == theirs
        for name, answers in trained.answers.items()
        for ours, theirs in zip(merged.answers[name], answers, strict=True)
    ]
    return Comparison(
        distance=distance(merged.logits, trained.logits),
        asked=len(same),
        same_answers=sum(same) / len(same) if same else None,
        score=merged.score,
        score_difference={name: merged.score[name] - score for name, score in trained.score.items()},
    )


def collect() -> None:
    """Give back the memory of models that are no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
