"""The command `finlora`: every option of every subcommand, declared once.

`make TARGET` calls these with its variables turned into options. The functions that do the work take plain arguments.
Commands have as many parameters as options, since typer reads the options from a function's signature.
What a command needs is imported within it: `finlora --help` then starts at once, without torch and axolotl.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import typer

from finlora.core import startup
from finlora.core.errors import UserError, run

app = typer.Typer(
    help="FinLoRA's fine-tuning runs as axolotl recipes.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# What follows -- is another program's: axolotl's options, or vLLM's.
PASSING_ON = ("train", "sweep", "serve")
AXOLOTL = "What follows -- goes to axolotl: -- --learning-rate 0.0002"


class Number(click.ParamType):
    """A number above 0 (or 0, with `or_zero`), up to `largest` where there is one."""

    name = "number"

    def __init__(self, kind: type = int, largest: int | None = None, or_zero: bool = False):
        self.kind, self.largest, self.or_zero = kind, largest, or_zero

    def convert(self, value: str | float, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            number = self.kind(value)
        except ValueError:
            number = -1
        if not (0 < number <= (self.largest or sys.float_info.max) or self.or_zero and number == 0):  # nor a NaN
            range = f"from 1 to {self.largest}" if self.largest else "of 0 or more" if self.or_zero else "above 0"
            self.fail(f"'{value}' is not a number {range}", parameter, context)
        return number


def option(text: str, *names: str, kind: click.ParamType | None = None, metavar: str | None = None) -> Any:
    """An option by its help; `names`: where it is not called as its parameter. kind: its values, by click's types."""
    return typer.Option(*names, help=text, click_type=kind, metavar=metavar)


Labels = Literal["corrected", "published"]

# Options that several commands have.
RecipeName = Annotated[str, typer.Argument(help="a name from `make recipes`, FinLoRA's name for a run, or a YAML file")]
Trained = Annotated[str | None, option("a trained recipe, by its name or FinLoRA's", "--recipe")]
Adapter = Annotated[str | None, option("PEFT adapter: folder or hub id")]
Base = Annotated[str | None, option("its base: hub id or folder (default: the adapter's own)", "--model")]
Bits = Annotated[
    int | None,
    option("bits of the base's weights (default: the recipe's, or 16)", kind=click.Choice([16, 8, 4])),
]
Tiny = Annotated[bool, option("the run of a tiny model, on any machine", "--tiny")]
Force = Annotated[bool, option("start over; earlier results are set aside", "--force")]
Track = Annotated[Literal["wandb", "mlflow", "none"] | None, option("log to it besides TensorBoard, or to none at all")]
TestSets = Annotated[str | None, option("test sets, tasks or groups (default: the recipe's)", "--tasks")]
Limit = Annotated[int | None, option("only the first rows of each set", kind=Number())]
Tests = Annotated[str | None, option("folder with test files of your own (test/<file> as in data/tasks.yaml)")]
LabelsUsed = Annotated[Labels, option("which labels count as right")]
Zero = Annotated[int | None, option("DeepSpeed's ZeRO stage: 1, 2 or 3", kind=click.Choice([1, 2, 3]))]
Offload = Annotated[bool, option("with --zero 2, 3 or --fsdp 2: use the CPU's memory too", "--offload")]
Fsdp = Annotated[int | None, option("2: shard the model with torch's FSDP2", kind=click.Choice([2]))]
Shots = Annotated[int, option("examples from the train file before each question", kind=Number(or_zero=True))]
Prompt = Annotated[str, option("chat template: saved (beside the adapter), finlora_inst or raw")]
KeepQuantised = Annotated[bool, option("do not dequantize 8- and 4-bit weights; slower, smaller", "--keep-quantised")]
Results = Annotated[Path | None, option("the folder that evaluations write to (default results)")]
Tasks = Annotated[list[str] | None, typer.Argument(metavar="[TASK]...", help="of data/tasks.yaml (default: all)")]
Raw = Annotated[Path | None, option("the folder of the fetched files (default data/raw)")]
OwnRows = Annotated[
    Path | None, option("rows of your own: .jsonl, .json, .csv, .tsv (or .gz, .zst) or .parquet", "--file")
]
Columns = Annotated[str | None, option("what the keys or columns of --file are", metavar="NAME=context,NAME=target")]
ContextColumn = Annotated[str, option("the key or column of the question in --file")]
TargetColumn = Annotated[str, option("the key or column of the answer in --file")]
AnyLabel = Annotated[bool, option("accept answers in --file outside the task's labels", "--any-label")]
Out = Annotated[Path | None, option("the folder to write to (default data/prepared/TASK)")]
Seed = Annotated[int, option("random seed of the validation split")]
Validation = Annotated[float, option("the share of rows that are held out")]
Mixture = Annotated[
    Literal["balanced", "finlora"],
    option("rows of a mixture's tasks: all as many as the largest, or as FinLoRA's script has them"),
]
Timeout = Annotated[float, option("seconds without data until a retry", kind=Number(float))]
Retries = Annotated[int, option("failed attempts in a row before a file is given up")]
Backoff = Annotated[float, option("seconds before the first retry")]
Manifest = Annotated[Path | None, option("the pinned files (default data/manifest.json)")]


def main(argv: list[str] | None = None) -> None:
    """Run a command. A user's mistake is one line on stderr and exit code 1, or 2 where it is in the options."""
    if argv is None:
        startup.start()
    run(lambda: _answer(sys.argv[1:] if argv is None else argv))


def _answer(argv: list[str]) -> None:
    try:
        call(argv)
    except click.exceptions.Exit as done:  # --help, or a command's own exit code
        sys.exit(done.exit_code)
    except click.ClickException as error:
        # click would print the usage in several lines and leave the reason last.
        message, remedy = " ".join(error.format_message().split()).rstrip("."), "--help lists the options"
        if os.environ.get("MAKELEVEL"):  # from make, whose variables they are
            message = re.sub(r"'--([a-z-]+)'", lambda option: f"{option[1].upper().replace('-', '_')}=", message)
            remedy = "make help lists the variables"
        print(f"error: {message}; {remedy}", file=sys.stderr)
        sys.exit(2)


def call(argv: list[str]) -> None:
    """Run a command in this process; mistakes are raised as UserError or as click's own errors."""
    rest: list[str] = []
    if argv and argv[0] in PASSING_ON and "--" in argv:
        cut = argv.index("--")
        argv, rest = argv[:cut], argv[cut + 1 :]
    command = typer.main.get_command(app)
    # Not app(): it answers Ctrl-C and mistakes itself.
    with command.make_context("finlora", list(argv), obj=rest) as context:
        command.invoke(context)


@app.command(epilog=AXOLOTL)
def train(
    context: typer.Context,
    recipe: RecipeName,
    tiny: Tiny = False,
    force: Force = False,
    gpus: Annotated[int, option("GPUs on this machine, one process each", kind=Number(largest=4096))] = 1,
    nodes: Annotated[int, option("number of machines; run the same command on each", kind=Number(largest=4096))] = 1,
    node_rank: Annotated[int, option("index of this machine, from 0")] = 0,
    master: Annotated[str | None, option("HOST or HOST:PORT of machine 0")] = None,
    zero: Zero = None,
    offload: Offload = False,
    fsdp: Fsdp = None,
    ray: Annotated[bool, option("on a Ray cluster: --gpus times --nodes workers", "--ray")] = False,
    cpu: Annotated[bool, option("without a GPU, however long it takes", "--cpu")] = False,
    epochs: Annotated[int | None, option("in place of the recipe's; a run with fewer goes on", kind=Number())] = None,
    first_adapter: Annotated[
        str | None, option("start from this adapter: its folder, or a trained recipe", "--from")
    ] = None,
    track: Track = None,
) -> None:
    """Train a recipe: all checks first, then `axolotl preprocess` and `axolotl train`."""
    from finlora.recipes import names
    from finlora.train.distributed import Launch
    from finlora.train.run import train

    launch = Launch(gpus, nodes, node_rank, master, zero, offload, fsdp, ray, cpu)
    options = {"args": context.obj, "tracker": track, "epochs": epochs, "first_adapter": first_adapter}
    train(names.find(recipe), launch, small=tiny, force=force, **options)


@app.command(epilog=AXOLOTL)
def sweep(
    context: typer.Context,
    recipe: RecipeName,
    sweep: Annotated[str, typer.Argument(help="a name from recipes/sweeps, or a YAML file")],
    tiny: Tiny = False,
    force: Force = False,
    gpus: Annotated[int, option("GPUs that share the points", kind=Number(largest=4096))] = 1,
    points_per_gpu: Annotated[
        int, option("points at a time on each GPU, for small models", kind=Number(largest=64))
    ] = 1,
    point: Annotated[
        int | None,
        option("only this point, from 1: for a task of an array job", kind=Number(largest=4096)),
    ] = None,
    list: Annotated[bool, option("show the points and run nothing", "--list")] = False,
    eval: Annotated[bool, option("evaluate each trained point", "--eval")] = False,
    tasks: TestSets = None,
    limit: Limit = None,
    labels: Annotated[Labels | None, option("with --eval: which labels count as right")] = None,
    shots: Shots = 0,
    tests: Tests = None,
    track: Track = None,
) -> None:
    """Train a recipe at each point of a sweep file, then one table and one plot."""
    from finlora.recipes import names
    from finlora.sweep import points
    from finlora.sweep import run as sweeps

    path, file = names.find(recipe).absolute(), points.find(sweep)
    if list:
        sweeps.show_points(path, file)
        return
    options = {"limit": limit, "labels": labels, "shots": shots, "tests": tests}
    evaluate = sweeps.eval_options(path, tasks, **options) if eval else None
    sweeps.sweep(path, file, sweeps.Options(tiny, force, gpus, points_per_gpu, point, evaluate, track, context.obj))


@app.command("eval")
def evaluate(
    recipe: Trained = None,
    model: Annotated[
        str | None, option("base model: hub id or folder; with --endpoint the name that is served")
    ] = None,
    adapter: Adapter = None,
    base: Annotated[bool, option("evaluate the base model too, in the same run", "--base")] = False,
    bits: Bits = None,
    tasks: TestSets = None,
    limit: Limit = None,
    labels: LabelsUsed = "corrected",
    lengths: Annotated[
        Literal["whole", "published"],
        option("how long answers may be: as a set's longest target, or as in FinLoRA"),
    ] = "whole",
    prompt: Prompt = "saved",
    shots: Shots = 0,
    tests: Tests = None,
    tiny: Tiny = False,
    name: Annotated[str | None, option("name of the results (default: the recipe's or the adapter's)")] = None,
    force: Force = False,
    keep_quantised: KeepQuantised = False,
    batch_tokens: Annotated[
        int | None, option("prompt tokens at a time (default: what memory allows)", kind=Number())
    ] = None,
    backend: Literal["transformers", "vllm"] = "transformers",
    endpoint: Annotated[
        str | None, option("base URL of an OpenAI-compatible server; its key in OPENAI_API_KEY")
    ] = None,
    encoder: Annotated[str | None, option("BERTScore's encoder: hub id or folder (default ProsusAI/finbert)")] = None,
    layer: Annotated[int | None, option("the encoder's layer for BERTScore (default 10)")] = None,
    results: Results = None,
) -> None:
    """Evaluate a trained adapter, a base model, or anything behind an endpoint, on FinLoRA's test sets."""
    options = locals()  # each is a field of Request
    from finlora.evaluate import evaluation, runner

    runner.run(evaluation.resolve(evaluation.Request(**options)))


@app.command()
def report(results: Results = None) -> None:
    """Write results/index.html and results/README.md from all evaluations."""
    from finlora.evaluate import report

    report.run(results or report.RESULTS)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="an evaluation: the name of a folder in results/")],
    b: Annotated[str, typer.Argument(metavar="B", help="another evaluation")],
    results: Results = None,
) -> None:
    """Test whether two evaluations differ, paired on the same rows."""
    from finlora.evaluate import compare

    compare.compare(a, b, (results or compare.RESULTS).resolve())


@app.command()
def plan(
    recipe: RecipeName,
    gpu: Annotated[str | None, option("a GPU of finlora/plan/gpus.yaml (default: the one in this machine)")] = None,
    gpus: Annotated[int, option("number of GPUs", kind=Number(largest=4096))] = 1,
    zero: Zero = None,
    offload: Offload = False,
    fsdp: Fsdp = None,
    price: Annotated[
        float | None,
        option("price of one GPU hour, in any currency, as 2.50", kind=Number(float, or_zero=True)),
    ] = None,
) -> None:
    """Estimate a run before it starts: parameters, memory, time, cost."""
    from finlora.plan import estimate
    from finlora.train.distributed import Launch

    estimate.run(recipe, gpu, Launch(gpus, zero=zero, offload=offload, fsdp=fsdp), price)


@app.command()
def merge(
    recipe: Trained = None,
    adapter: Adapter = None,
    model: Base = None,
    bits: Bits = None,
    tiny: Tiny = False,
    into: Annotated[
        Literal["full", "dequantised"] | None, option("what to merge into (default: the closer one)")
    ] = None,
    limit: Annotated[int, option("rows of each test set to compare answers on, 0 for none")] = 100,
    prompt: Prompt = "saved",
    force: Force = False,
) -> None:
    """Merge a trained adapter into its base and verify it: 16-bit safetensors with tokenizer and chat template."""
    from finlora.models.trained import load_trained

    if limit < 0:
        raise UserError(f"LIMIT={limit}: give a number of rows, 0 for none")
    trained = load_trained(recipe, adapter, model, bits, tiny)
    from finlora.export import merge  # torch and PEFT: after the options have been checked

    merge.run(trained, into, limit, prompt, force)
    print(f"next      make serve {trained.options}, or make chat {trained.options}")


@app.command(epilog="What follows -- goes to vLLM: -- --max-model-len 8192")
def serve(
    context: typer.Context,
    recipe: Trained = None,
    adapter: Adapter = None,
    model: Base = None,
    bits: Bits = None,
    tiny: Tiny = False,
    port: Annotated[int, option("port to listen on", kind=Number(largest=65535))] = 8000,
    host: Annotated[str, option("address to listen on (default: this machine alone)")] = "127.0.0.1",
    backend: Annotated[
        Literal["vllm", "transformers"] | None, option("default: vllm with a GPU, else transformers")
    ] = None,
) -> None:
    """Serve a merged model behind an OpenAI-compatible endpoint."""
    from finlora.export.serve import serve
    from finlora.models.trained import load_trained

    serve(load_trained(recipe, adapter, model, bits, tiny), host, port, backend, context.obj)


@app.command()
def chat(
    recipe: Trained = None,
    adapter: Adapter = None,
    model: Base = None,
    bits: Bits = None,
    tiny: Tiny = False,
    keep_quantised: KeepQuantised = False,
    prompt: Prompt = "saved",
    max_new_tokens: Annotated[int, option("longest answer, in tokens", kind=Number())] = 256,
) -> None:
    """Talk to a trained adapter in the terminal, with the chat template that is saved beside it."""
    from finlora.models.trained import load_trained

    trained = load_trained(recipe, adapter, model, bits, tiny)
    from finlora.export import chat  # torch and PEFT: after the options have been checked

    chat.run(trained, prompt, keep_quantised, max_new_tokens)


@app.command()
def publish(
    recipe: Trained = None,
    tiny: Tiny = False,
    repo: Annotated[str, option("<user or organisation>/<model> on the Hub")] = "",
    merged: Annotated[bool, option("the merged model instead of the adapter", "--merged")] = False,
    private: Annotated[bool, option("where the repository is new: visible to you alone", "--private")] = False,
    push: Annotated[bool, option("push; without it nothing leaves this machine", "--push")] = False,
) -> None:
    """Write a trained recipe's model card and list what would go to the Hub."""
    from finlora.export.publish import publish
    from finlora.models.trained import load_trained

    if not recipe:
        raise UserError("give RECIPE=<trained recipe> and REPO=<user or organisation>/<model>")
    publish(load_trained(recipe, tiny=tiny), repo, merged, private, push)


@app.command()
def recipes(
    task: Annotated[str | None, option("only the recipes of this task")] = None,
) -> None:
    """List the recipes."""
    from finlora.recipes import load

    load.show(task)


@app.command("new")
def write_new(recipe: Annotated[str, typer.Argument(help="the name of the recipe to write")] = "") -> None:
    """Write a recipe by its name, from the nearest one."""
    from finlora.recipes.new import new

    new(recipe)


@app.command()
def check() -> None:
    """Check every recipe: keys, types, names, factorisation."""
    from finlora.recipes import load

    load.check()


@app.command()
def fetch(
    tasks: Tasks = None,
    timeout: Timeout = 30,
    retries: Retries = 5,
    backoff: Backoff = 1,
    manifest: Manifest = None,
    raw: Raw = None,
) -> None:
    """Fetch FinLoRA's files at the pinned commit, each verified; FINLORA_MIRROR takes them from a copy."""
    from finlora.data import fetch

    patience = fetch.Patience(timeout, retries, backoff)
    fetch.run(tasks or [], raw or fetch.RAW, manifest or fetch.MANIFEST, patience)


@app.command("data", help="Fetch and prepare tasks; with --file prepare rows of your own.")
@app.command("prepare", help="Prepare fetched files, or rows of your own, for training.")
def prepare(
    context: typer.Context,
    tasks: Tasks = None,
    raw: Raw = None,
    out: Out = None,
    file: OwnRows = None,
    context_column: ContextColumn = "context",
    target_column: TargetColumn = "target",
    columns: Columns = None,
    any_label: AnyLabel = False,
    seed: Seed = 42,
    validation: Validation = 0.02,
    labels: LabelsUsed = "corrected",
    mixture: Mixture = "balanced",
) -> None:
    from finlora.data import prepare

    if context.info_name == "data" and not file:
        from finlora.data.tasks import task

        # FinLoRA's script builds a mixture from its tasks' files; its own file of the mixture is not needed then.
        parts = [part for name in tasks or [] for part in task(name).mixture_of or [name]]
        fetch(parts if mixture == "finlora" else tasks, raw=raw)
    rows = own_rows(file, context_column, target_column, columns, any_label)
    options = prepare.Options(**rows, seed=seed, validation=validation, labels=labels, mixture=mixture)
    prepare.run(tasks or [], raw, out, options)


def own_rows(file: Path | None, context_column: str, target_column: str, columns: str | None, any_label: bool) -> dict:
    """The fields of finlora.data.prepare.Options about rows of one's own."""
    from finlora.data.layouts import parse_columns

    names = {"context_column": context_column, "target_column": target_column, "columns": parse_columns(columns)}
    return names | {"file": str(file.absolute()) if file else None, "any_label": any_label}


@app.command()
def task(
    name: Annotated[str, option("of the task: lower-case words, joined by _")],
    file: Annotated[Path, option("the rows to train on")],
    test: Annotated[Path, option("the rows to evaluate on")],
    columns: Columns = None,
    labels: Annotated[
        str | None, option("all answers, as good,bad (default: those of the rows, where they are few)")
    ] = None,
    metric: Annotated[
        Literal["accuracy_f1", "tag_accuracy_f1", "accuracy", "bertscore_f1"] | None,
        option("default: by the answers"),
    ] = None,
) -> None:
    """Make a task of your own rows, which all commands then take by its name."""
    from finlora.data import own_tasks
    from finlora.data.layouts import parse_columns

    answers = [label.strip() for label in labels.split(",")] if labels else None
    own_tasks.add(name, file, test, parse_columns(columns), answers, metric)


@app.command()
def audit(
    tasks: Tasks = None,
    raw: Raw = None,
    json: Annotated[Path | None, option("where <task>.json goes (default data/audit)", metavar="FOLDER")] = None,
    file: OwnRows = None,
    context_column: ContextColumn = "context",
    target_column: TargetColumn = "target",
    columns: Columns = None,
    any_label: AnyLabel = False,
    tokenizer: Annotated[
        Path | None,
        option("a folder with tokenizer.json, or Llama-3's tokenizer.model, to count tokens with"),
    ] = None,
    sequence_len: Annotated[int | None, option("sequence length (default: the recipe's)")] = None,
    no_tokens: Annotated[bool, option("do not count tokens", "--no-tokens")] = False,
) -> None:
    """Report labels, duplicates, leaks and lengths of the fetched files. Exit code 1 where one needs attention."""
    from finlora.data import audit

    rows = own_rows(file, context_column, target_column, columns, any_label)
    own = audit.Options(**rows) if file else None
    counting = {"tokenizer": tokenizer, "sequence_len": sequence_len, "count_tokens": not no_tokens}
    attention = audit.run(tasks or [], raw or audit.RAW, json or audit.OUT, own, **counting)
    sys.exit(bool(attention))


@app.command()
def doctor(
    recipe: Annotated[str, option("what is to be trained")] = "sentiment_r8_dora",
) -> None:
    """Print what a bug report needs. Exit code 1 where something that training needs is missing."""
    from finlora.recipes import load, names
    from finlora.train import doctor

    doctor.run(load.load(names.find(recipe)))


@app.command()
def pictures() -> None:
    """Draw docs/speed.svg and docs/scores.svg from the recorded results."""
    from finlora.plan import pictures

    pictures.run()


@app.command()
def demo(
    data: Annotated[Path | None, option('rows of your own: {"context": ..., "target": ...} in each line')] = None,
    columns: Columns = None,
) -> None:
    """The whole path on two CPU cores: base model, DoRA through axolotl, merge, and a table on held-out rows."""
    from finlora import demo

    demo.run(data, columns)
