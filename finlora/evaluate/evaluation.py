"""What to evaluate: what a user asks for, and what it stands for once model, prompt and test sets are looked up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdora.plugin.checksums import weights_sha256
from fastdora.plugin.prompts import end_of_turn_tokens
from finlora.core.errors import UserError
from finlora.core.paths import ROOT, shown, slug
from finlora.evaluate.questions import Encoder, Questions, choose_sets, read_questions, with_length
from finlora.evaluate.results import RESULTS, Run
from finlora.models.trained import TrainedModel, fetch_base_model, load_asked, prompts

ENCODER = Encoder()


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
    """What a request stands for, looked up and read; no weights are loaded yet."""

    trained: TrainedModel  # a base alone, or what an endpoint serves, has no adapter
    questions: list[Questions]
    tokenizer: Any  # with the prompt's chat template; None behind an endpoint
    runs: list[Run]  # the models to ask, the base first, as their run.json will describe them
    results: Path  # the folder of theirs
    encoder: Encoder
    batch_tokens: int | None
    force: bool


def resolve(request: Request) -> Evaluation:
    """Look up what is to be evaluated. Raises UserError where it is not there or the options contradict each other."""
    check_options(request)
    trained = load_asked(request.recipe, request.adapter, request.model, request.bits, request.tiny)
    sets, folder = choose_sets(request.tasks, trained.run, request.tests, request.shots)
    # Files are read before a base is fetched, which may take an hour.
    questions = [read_questions(name, folder, request.labels, request.shots, request.limit) for name in sets]
    tokenizer = None
    if not request.endpoint:
        from finlora.models import load  # late: torch and transformers take seconds

        fetch_base_model(trained, request.force)
        if trained.adapter:
            load.check_fits(trained.adapter, trained.facts, trained.base_model)
        tokenizer = load.load_tokenizer(trained.base_model, trained.adapter, request.prompt)
    questions = [with_length(one, request.lengths, tokenizer) for one in questions]
    encoder = Encoder(request.encoder or ENCODER.model, ENCODER.layer if request.layer is None else request.layer)
    runs = describe(request, trained, tokenizer)
    return Evaluation(
        trained, questions, tokenizer, runs, request.results, encoder, request.batch_tokens, request.force
    )


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


def describe(request: Request, trained: TrainedModel, tokenizer) -> list[Run]:
    """The models to evaluate, the base first. An endpoint's has no tokenizer."""
    shots = request.shots or None
    name = named(request, request.name or trained.run.results_name or trained.name)
    if request.endpoint:
        prompt = {"prompt": "endpoint", "shots": shots, "way": "endpoint", "backend": request.endpoint}
        return [Run(subject=name, model=trained.base_model, method="base", tiny=False, **prompt)]
    from finlora.models.load import template_sha256  # late: torch and transformers take seconds

    base = named(request, f"base-{slug(trained.base_model)}-{trained.bits}bit")
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
