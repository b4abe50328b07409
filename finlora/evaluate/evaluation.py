"""What to evaluate: what a user asks for, and what it stands for once model, prompt and test sets are looked up."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdora.plugin.checksums import weights_sha256
from fastdora.plugin.prompts import end_of_turn_tokens
from finlora.core.errors import UserError
from finlora.core.paths import RAW, ROOT, SAMPLE, shown, slug
from finlora.data.test_sets import all_sets, choose
from finlora.evaluate import forgetting
from finlora.evaluate.questions import Questions, read_questions, with_length
from finlora.evaluate.results import RESULTS, Run
from finlora.models.trained import TrainedModel, fetch_base_model, load_trained, prompts
from finlora.train.runs import TrainedRecipe


@dataclass
class Request:
    """The options of `finlora eval`. Without a recipe, a model or an adapter there is nothing to evaluate."""

    recipe: str | None = None  # a trained one, by its name or FinLoRA's
    model: str | None = None  # base model: hub id or folder; with an endpoint the name that is served
    adapter: str | None = None  # PEFT adapter: hub id or folder
    base: bool = False  # evaluate the base model too
    bits: int | None = None  # 16, 8 or 4: of the base's weights; None for the recipe's, or 16
    tasks: str | None = None  # test sets, tasks or groups, comma-separated; None for the recipe's
    limit: int | None = None  # the first rows of each set only
    labels: str = "corrected"  # or published
    lengths: str = "whole"  # how long answers may be: as the longest target, or published, as in FinLoRA
    prompt: str = "saved"  # beside the adapter; or finlora_inst, raw
    shots: int = 0  # examples from the train file before each question
    tests: str | None = None  # folder with test files of one's own
    tiny: bool = False  # the adapter of a TINY=1 run
    name: str | None = None  # of the results
    force: bool = False  # set earlier answers aside and ask anew
    keep_quantised: bool = False  # leave 8- and 4-bit weights as they are
    batch_tokens: int | None = None  # prompt tokens at a time; None for what memory allows
    backend: str = "transformers"  # or vllm
    endpoint: str | None = None  # base URL of an OpenAI-compatible server
    encoder: str | None = None  # BERTScore's: hub id or folder
    layer: int | None = None  # of the encoder
    results: Path | None = None  # the folder that answers are kept in; None for results/

    def __post_init__(self) -> None:
        self.results = Path(self.results or RESULTS).resolve()


@dataclass(frozen=True)
class Evaluation:
    """A request with its model, prompt and test sets looked up and read; no weights are loaded yet."""

    request: Request
    trained: TrainedModel  # a base alone, or what an endpoint serves, has no adapter
    questions: list[Questions]
    tokenizer: Any  # with the prompt's chat template; None behind an endpoint
    runs: list[Run]  # the models to ask, the base first, as their run.json will describe them


def resolve(request: Request) -> Evaluation:
    """Look up what is to be evaluated. Raises UserError where it is not there or the options contradict each other."""
    check_options(request)
    trained = find_model(request)
    sets, folder = sets_and_folder(request, trained.run)
    # Files are read before a base is fetched, which may take an hour.
    questions = [read_questions(name, folder, request.labels, request.shots) for name in sets]
    tokenizer = None
    if not request.endpoint:
        from finlora.models import load  # late: torch and transformers take seconds

        fetch_base_model(trained, request.force)
        if trained.adapter:
            load.check_fits(trained.adapter, trained.facts, trained.base_model)
        tokenizer = load.load_tokenizer(trained.base_model, trained.adapter, request.prompt)
    questions = [with_length(one, request.lengths, tokenizer) for one in questions]
    return Evaluation(request, trained, questions, tokenizer, describe(request, trained, tokenizer))


def check_options(request: Request) -> None:
    """UserError for options that contradict each other."""
    if request.recipe and (request.model or request.adapter or request.endpoint):
        raise UserError("RECIPE= says model and adapter already; leave out MODEL=, ADAPTER= and ENDPOINT=, or RECIPE=")
    if not (request.recipe or request.model or request.adapter):
        raise UserError("nothing to evaluate; give RECIPE=<trained recipe>, or MODEL= and ADAPTER= (hub id or folder)")
    if request.name and slug(request.name) != request.name:
        raise UserError(f"NAME={request.name}: becomes a folder of results/; write {slug(request.name)}")
    if request.prompt not in prompts():
        raise UserError(f"PROMPT={request.prompt}: there are {', '.join(prompts())}")
    if request.endpoint and (request.adapter or request.base or not request.model):
        raise UserError("ENDPOINT= takes MODEL=<the name it serves> and neither ADAPTER= nor BASE=1")


def find_model(request: Request) -> TrainedModel:
    """The trained recipe or adapter, or the base alone. BITS= may be others than those of training."""
    if not (request.recipe or request.adapter):
        return TrainedModel(slug(request.model), f"MODEL={request.model}", request.model, request.bits or 16)
    trained = load_trained(request.recipe, request.adapter, request.model, None, request.tiny)
    if request.adapter and not request.model:
        print(f"MODEL= is not given: taking the adapter's own base, {trained.base_model}")
    return replace(trained, bits=request.bits or trained.bits)


def describe(request: Request, trained: TrainedModel, tokenizer) -> list[Run]:
    """The models to evaluate, the base first. An endpoint's has no tokenizer."""
    shots = request.shots or None
    name = named(request, request.name or trained.run.results_name or trained.name)
    if request.endpoint:
        prompt = {"prompt": "endpoint", "shots": shots, "way": "endpoint", "backend": request.endpoint}
        return [Run(subject=name, model=trained.base_model, method="base", tiny=False, **prompt)]
    from finlora.models.load import template_sha256  # late: torch and transformers take seconds

    quantised = trained.bits != 16 and request.keep_quantised
    common: dict[str, Any] = {
        "model": shown(trained.base_model),
        "base_sha256": weights_sha256(trained.base_model, ROOT),
        "bits": trained.bits,
        "prompt": request.prompt,
        "shots": shots,
        "template_sha256": template_sha256(tokenizer),
        "ends": tokenizer.convert_ids_to_tokens(end_of_turn_tokens(tokenizer, trained.eot_tokens)),
        "backend": request.backend,
        "tiny": trained.run.tiny,
    }
    runs = []
    if request.base or not trained.adapter:
        base = named(request, f"base-{slug(trained.base_model)}-{trained.bits}bit")
        base = base if trained.adapter else request.name or base
        runs.append(Run(subject=base, method="base", way="quantised" if quantised else "plain", **common))
    if trained.adapter:
        adapter = Run(
            subject=name,
            recipe=trained.run.recipe,
            training=trained.run.training,
            adapter=shown(trained.adapter),
            adapter_sha256=trained.facts.sha256,
            method=trained.facts.method,
            r=trained.facts.r,
            alpha=trained.facts.alpha,
            way="cached norms" if quantised else "merged",
            **common,
        )
        runs.append(adapter)
    return runs


def named(request: Request, name: str) -> str:
    """The name of results under the request's prompt and examples."""
    name = name if request.prompt == "saved" else f"{name}-{request.prompt}"
    return f"{name}-{request.shots}shot" if request.shots else name


def sets_and_folder(request: Request, trained: TrainedRecipe) -> tuple[list[str], Path]:
    """The test sets and the folder of their files: TESTS=, data/raw, or the sample where a tiny run has no others."""
    names = [name for name in re.split(r"[,\s]+", request.tasks or "") if name]
    sets = forgetting.choose(names, choose) if names else trained.test_sets
    if not sets:
        raise UserError(
            "no test set is named; give TASKS=, for example TASKS=general, TASKS=sentiment or TASKS=fpb,tfns"
        )
    files = {name: all_sets()[name].file for name in sets if name in all_sets()}
    if request.shots and len(files) < len(sets):
        raise UserError(f"SHOTS={request.shots}: MMLU and GSM8K have examples of their own; leave them out with TASKS=")
    if request.tests or not trained.tiny or not files or any((RAW / file).is_file() for file in files.values()):
        return sets, Path(request.tests) if request.tests else RAW
    sets = [name for name, file in files.items() if (SAMPLE / file).is_file()]
    if not sets:
        raise UserError("the test files are not here and there is no sample of them; run `make data TASK=...`")
    print(f"no test file is fetched: taking the sample rows of {', '.join(sets)}")
    return sets, SAMPLE
