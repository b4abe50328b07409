"""What to evaluate: what a user asks for, and what it stands for once recipe, adapter and test sets are looked up."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdora.plugin.checksums import weights_sha256
from fastdora.plugin.prompts import end_of_turn_tokens
from finlora.core.errors import UserError
from finlora.core.paths import RAW, ROOT, SAMPLE, shown, slug
from finlora.data.test_sets import all_sets, choose
from finlora.evaluate import forgetting
from finlora.evaluate.results import RESULTS, Run
from finlora.models.load import prompts, template_sha256
from finlora.models.trained import AdapterFacts, adapter_facts, check_named_base, resolve_adapter
from finlora.train.runs import TrainedRecipe, check_start, of_recipe


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
    """A request with its recipe, adapter and test sets looked up; no weights are loaded yet."""

    request: Request
    name: str  # of the results' folder
    model: str  # base model: hub id or folder; with an endpoint the name that is served
    adapter: Path | None
    adapter_facts: AdapterFacts | None
    bits: int
    sets: list[str]
    folder: Path  # of the test files
    recipe: str | None = None
    tiny: bool = False
    training: dict[str, Any] | None = None  # of the recipe: metrics, args, log
    trained_on: set[str] | None = None  # normalised contexts; None where they are not known

    @property
    def eot_tokens(self) -> tuple[str, ...]:
        """Of the adapter's recipe. Its base is asked with the same tokenizer, template and ends."""
        return self.adapter_facts.eot_tokens if self.adapter_facts else ()

    def runs(self, tokenizer) -> list[Run]:
        """The models to evaluate, the base first, as their run.json will describe them; endpoints have no tokenizer."""
        request = self.request
        shots = request.shots or None
        if request.endpoint:
            prompt = {"prompt": "endpoint", "shots": shots, "way": "endpoint", "backend": request.endpoint}
            return [Run(subject=self.name, model=self.model, method="base", tiny=False, **prompt)]
        quantised = self.bits != 16 and request.keep_quantised
        common: dict[str, Any] = {
            "model": shown(self.model),
            "base_sha256": weights_sha256(self.model, ROOT),
            "bits": self.bits,
            "prompt": request.prompt,
            "shots": shots,
            "backend": request.backend,
            "tiny": self.tiny,
        }
        if tokenizer:
            ends = tokenizer.convert_ids_to_tokens(end_of_turn_tokens(tokenizer, self.eot_tokens))
            common |= {"template_sha256": template_sha256(tokenizer), "ends": ends}
        runs = []
        if request.base or not self.adapter:
            name = with_prompt(f"base-{slug(self.model)}-{self.bits}bit", request)
            name = name if self.adapter else request.name or name
            runs.append(Run(subject=name, method="base", way="quantised" if quantised else "plain", **common))
        if self.adapter:
            facts = self.adapter_facts
            adapter: dict[str, Any] = {"method": facts.method, "r": facts.r, "alpha": facts.alpha}
            adapter |= {
                "adapter_sha256": facts.sha256,
                "adapter": shown(str(self.adapter)),
                "way": "cached norms" if quantised else "merged",
            }
            runs.append(Run(subject=self.name, recipe=self.recipe, training=self.training, **adapter, **common))
        return runs


def with_prompt(name: str, request: Request) -> str:
    name = name if request.prompt == "saved" else f"{name}-{request.prompt}"
    return f"{name}-{request.shots}shot" if request.shots else name


def resolve(request: Request) -> Evaluation:
    """Look up what is to be evaluated. Raises UserError where it is not there or the options contradict each other."""
    if request.recipe and (request.model or request.adapter or request.endpoint):
        raise UserError("RECIPE= says model and adapter already; leave out MODEL=, ADAPTER= and ENDPOINT=, or RECIPE=")
    if not (request.recipe or request.model or request.adapter):
        raise UserError("nothing to evaluate; give RECIPE=<trained recipe>, or MODEL= and ADAPTER= (hub id or folder)")
    trained = of_recipe(request.recipe, request.tiny) if request.recipe else TrainedRecipe()
    model, adapter = trained.model or request.model, trained.adapter
    if request.adapter:
        adapter = resolve_adapter(request.adapter)
    facts = adapter_facts(adapter) if adapter else None
    if request.adapter:
        same_weights = check_start(adapter, request.model or facts.base)
        if request.model and not (same_weights or request.force or request.endpoint):
            check_named_base(request.model, facts, force=True)
    if facts and not model:
        model = facts.base
        print(f"MODEL= is not given: taking the adapter's own base, {model}")
    if request.name and slug(request.name) != request.name:
        raise UserError(f"NAME={request.name}: becomes a folder of results/; write {slug(request.name)}")
    if request.prompt not in prompts():
        raise UserError(f"PROMPT={request.prompt}: there are {', '.join(prompts())}")
    if request.endpoint and (request.adapter or request.base or not request.model):
        raise UserError("ENDPOINT= takes MODEL=<the name it serves> and neither ADAPTER= nor BASE=1")
    name = request.name or trained.results_name or slug(request.adapter or request.model)
    sets, folder = sets_and_folder(request, trained.test_sets, trained.tiny)
    return Evaluation(
        request=request,
        name=with_prompt(name, request),
        model=model,
        adapter=adapter,
        adapter_facts=facts,
        bits=request.bits or trained.bits or 16,
        sets=sets,
        folder=folder,
        recipe=trained.recipe,
        tiny=trained.tiny,
        training=trained.training,
        trained_on=trained.trained_on,
    )


def sets_and_folder(request: Request, default: list[str], tiny: bool) -> tuple[list[str], Path]:
    """The test sets and the folder of their files: TESTS=, data/raw, or the sample where a tiny run has no others."""
    names = [name for name in re.split(r"[,\s]+", request.tasks or "") if name]
    sets = forgetting.choose(names, choose) if names else default
    if not sets:
        raise UserError(
            "no test set is named; give TASKS=, for example TASKS=general, TASKS=sentiment or TASKS=fpb,tfns"
        )
    files = {name: all_sets()[name].file for name in sets if name in all_sets()}
    if request.shots and len(files) < len(sets):
        raise UserError(f"SHOTS={request.shots}: MMLU and GSM8K have examples of their own; leave them out with TASKS=")
    if request.tests or not tiny or not files or any((RAW / file).is_file() for file in files.values()):
        return sets, Path(request.tests) if request.tests else RAW
    sets = [name for name, file in files.items() if (SAMPLE / file).is_file()]
    if not sets:
        raise UserError("the test files are not here and there is no sample of them; run `make data TASK=...`")
    print(f"no test file is fetched: taking the sample rows of {', '.join(sets)}")
    return sets, SAMPLE
