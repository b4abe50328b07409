"""Sweep a recipe: a run for each point of a sweep file, then one table and one plot (`make sweep`).

finlora sweep sentiment_r8_dora rank [--gpus 4] [--eval] [--point 3] [--list] [-- axolotl's own options]

A sweep file is axolotl's: `key: [values]` in every combination, and under `_` a list of keys that change together. What
axolotl does with it (`axolotl train --sweep`) shuffles the points into numbered folders, keeps no map, collects nothing
and hides failures; here each point is a whole recipe in outputs/sweeps/<recipe>.<sweep>/ that `make train` trains.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from finlora.core import files, machine
from finlora.core.errors import UserError
from finlora.core.files import write_json
from finlora.core.paths import ROOT, shown
from finlora.data.tasks import load_tasks
from finlora.data.test_sets import read_set
from finlora.evaluate.evaluation import Request, named, resolve
from finlora.evaluate.questions import FORGETTING, named_sets
from finlora.evaluate.results import unanswered
from finlora.recipes import bases, memory
from finlora.recipes import names as recipe_names
from finlora.recipes.load import NAMED
from finlora.recipes.recipe import option_values, output_folder
from finlora.sweep.points import SweepPoint, changes_text, plan
from finlora.sweep.report import Outcome, SweepReport, report
from finlora.train import run as train
from finlora.train import runs, tracking

THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")  # of torch and tokenizers
PROCESSES = "AXOLOTL_DATASET_NUM_PROC"  # that axolotl starts to tokenize; 0: none, it does so itself
FINLORA = (sys.executable, "-m", "finlora")  # what trains and evaluates a point, in a process of its own


@dataclass(frozen=True)
class Options:
    """How to run the points of a sweep."""

    tiny: bool = False  # on the tiny base model
    force: bool = False  # train and evaluate anew
    gpus: int = 1  # that share the points
    points_per_gpu: int = 1  # at a time on each GPU: small models leave room for several
    point: int | None = None  # only this one, counted from 1: an array job runs one a task
    evaluate: dict[str, Any] | None = None  # evaluate too: tasks, limit, labels, shots and tests of `finlora eval`
    track: str | None = None  # as in finlora.train.run
    args: list[str] = field(default_factory=list)  # axolotl's own options


@dataclass
class Job:
    """A point's commands that are still to run, as arguments of `finlora`, and the process that runs now."""

    name: str
    log: Path
    commands: list[list[str]]
    gpu: str | None = None
    process: subprocess.Popen | None = None
    began: float = 0
    bytes_shown: int = 0  # of the log


def sweep(recipe: Path, file: Path, options: Options) -> SweepReport | None:
    """Train the points that are not trained yet, write table.md and index.html, and return what they show.

    A point that fails leaves the others alone; at the end UserError has its line.
    """
    points = plan(recipe, file)
    check(file, points, options)
    folder = output_folder(points[0].recipe, options.tiny).parent
    # Taken before a file is written, and with TINY=1 too: the recipes that another sweep still has to train lie there.
    # The tasks of an array (POINT=) share the folder.
    with runs.folder_lock(points[0].path.parent) if options.point is None else nullcontext() as lock:
        mark_folder(folder, recipe, file)
        for point in points:
            point.write(recipe)
        chosen = points if options.point is None else [points[options.point - 1]]
        jobs = [Job(point.name, log_of(point, options), commands_of(point, folder, options)) for point in chosen]
        jobs = [job for job in jobs if job.commands]
        print(f"{shown(file)} on {recipe.stem}: {len(points)} points, {len(jobs)} to run", flush=True)
        failed: dict[str, str] = {}
        no_gpu = None
        try:
            failed = work(jobs, slots(options, points[0]), lock) if jobs else {}
        except UserError as error:
            no_gpu = error  # what is trained is shown all the same: an array's table may be made where no GPU is
        outcomes = []
        for point in points:
            record = train.finished_run(point.path, options.tiny, options.args)
            error = failed.get(point.name) or (None if record else reason(log_of(point, options)))
            outcomes.append(Outcome(point, record, error, shots=(options.evaluate or {}).get("shots", 0)))
        result = report(recipe, file, outcomes, folder) if any(outcome.run for outcome in outcomes) else None
        if no_gpu:
            raise no_gpu
        if failed:
            raise UserError("\nerror: ".join(f"{name}: {text}" for name, text in failed.items()))
        return result


def check(file: Path, points: list[SweepPoint], options: Options) -> None:
    """UserError for options that the points contradict, before anything is trained."""
    for key in option_values(options.args):
        if key in NAMED or any(key in point.changes for point in points):
            raise UserError(
                f"ARGS={shlex.join(options.args)}: {key} is what the points differ by; change {shown(file)}"
            )
    if options.point is not None and not 1 <= options.point <= len(points):
        raise UserError(f"POINT={options.point}: {shown(file)} has points 1 to {len(points)}; LIST=1 shows them")
    if options.evaluate is not None:
        tasks = options.evaluate.get("tasks") or "sentiment"
        for name in named_sets(tasks):
            if not options.tiny and name not in FORGETTING:
                read_set(name, *([Path(tests)] if (tests := options.evaluate.get("tests")) else []))
    tracking.check(options.track)


def commands_of(point: SweepPoint, folder: Path, options: Options) -> list[list[str]]:
    """The commands that a point still needs, as arguments of `finlora`: train, evaluate, one of them or none."""
    tiny, force = ["--tiny"] * options.tiny, ["--force"] * options.force
    track = ["--track", options.track] if options.track else []
    commands = []
    record = None if options.force else train.finished_run(point.path, options.tiny, options.args)
    if not record:
        commands.append(["train", str(point.path), *tiny, *force, *track, "--", *options.args])
    if options.evaluate is not None:
        request = Request(recipe=str(point.path), results=folder / "results", tiny=options.tiny, **options.evaluate)
        before = files.read_json(request.results / named(request, point.name + ".tiny" * options.tiny) / "run.json")
        stale = before and (not record or before.get("adapter_sha256") != record["adapter"]["sha256"])
        if not record or stale or not answered(request):
            asked = [part for key, value in options.evaluate.items() for part in (f"--{key}", str(value))]
            command = ["eval", "--recipe", request.recipe, "--results", str(request.results), *asked, *tiny]
            commands.append([*command, *(["--force"] if stale else force)])
    return commands


def answered(request: Request) -> bool:
    """Whether all that an evaluation would ask is answered; what measures the answers is brought up to date."""
    evaluation = resolve(request)
    folder = evaluation.results / evaluation.runs[-1].subject
    return not any(unanswered(folder / one.name, one, evaluation.encoder) for one in evaluation.questions)


def mark_folder(folder: Path, recipe: Path, file: Path) -> None:
    """Make the folder that of this recipe and sweep file; UserError where it is that of others of the same names."""
    mine = {"recipe": shown(recipe), "sweep": shown(file)}
    before = files.read_json(folder / "sweep.json")
    for key, path in (("recipe", recipe), ("sweep", file)) if isinstance(before, dict) else ():
        other = ROOT / str(before.get(key))
        if other.is_file() and not other.samefile(path):
            raise UserError(f"{shown(folder)}: is the sweep of {before[key]}; give {mine[key]} another name")
    if before != mine:
        write_json(folder / "sweep.json", mine)


def slots(options: Options, point: SweepPoint) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each point at a time; None leaves it as it is. UserError where GPUs are missing."""
    each, gpus, here = options.points_per_gpu, options.gpus, len(machine.gpus())
    shape = None if options.tiny else bases.shape(point.recipe["base_model"])
    if shape and not memory.on_cpu(shape) and here < gpus:
        raise UserError(
            f"GPUS={gpus}: a point needs a GPU and {here or 'none'} {'are' if here > 1 else 'is'} here; TINY=1 tries "
            "the sweep on a tiny model"
        )
    if gpus == 1:
        return [None] * each
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(gpus)]
    if len(devices) < gpus:
        raise UserError(f"GPUS={gpus}: CUDA_VISIBLE_DEVICES={visible} shows fewer; name {gpus} there, or take GPUS=1")
    return devices[:gpus] * each


def work(jobs: list[Job], free: list[str | None], lock: IO | None) -> dict[str, str]:
    """Run each job's commands, at most one job in each slot; why each one that failed did, by its name.

    With one slot its output is shown as it comes, with several each job has a line when it begins and ends. All of it
    is kept in <point>.log. Ctrl-C lets each run save a checkpoint.
    """
    waiting, running, failed = list(jobs), [], {}
    alone = len(free) == 1
    share = {machine.POINTS_PER_GPU: str(free.count(free[0]))}
    if not alone:
        threads = max(1, (os.cpu_count() or 1) // len(free))
        # axolotl starts a process for each core to tokenize: with 16 points at a time on 16 cores that took three
        # minutes. Each imports axolotl anew, ten seconds of a core, so for two or fewer it does not pay.
        share |= dict.fromkeys(THREADS, str(threads)) | {PROCESSES: str(threads if threads > 2 else 0)}
    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                job.gpu, job.began = free.pop(0), time.monotonic()
                job.log.parent.mkdir(parents=True, exist_ok=True)
                job.log.write_bytes(b"")
                place = f" on GPU {job.gpu}" if job.gpu is not None else ""
                print(f"[{len(jobs) - len(waiting)}/{len(jobs)}] {job.name}{place}: {shown(job.log)}", flush=True)
                running.append(job)
                job.process = start(job.commands.pop(0), job.gpu, job.log, lock, share)
            time.sleep(0.1)
            for job in list(running):
                code = job.process.poll()
                if alone:
                    job.bytes_shown += echo(job.log, job.bytes_shown)
                if code == 0 and job.commands:
                    job.process = start(job.commands.pop(0), job.gpu, job.log, lock, share)
                elif code is not None:
                    running.remove(job)
                    free.append(job.gpu)
                    if code:
                        failed[job.name] = why(job.log, code)
                    ended = f"failed: {failed[job.name]}" if code else "done"
                    print(f"{job.name}: {ended} ({time.monotonic() - job.began:.0f} s)", flush=True)
    except (KeyboardInterrupt, SystemExit):
        print("\ninterrupted; the same command resumes from here", file=sys.stderr, flush=True)
        try:
            end(running, signal.SIGTERM)
        except KeyboardInterrupt:
            end(running, signal.SIGINT)
        raise
    return failed


def start(argv: list[str], gpu: str | None, log: Path, lock: IO | None, share: dict[str, str]) -> subprocess.Popen:
    """`finlora argv...` with its output in the log. Ctrl-C reaches it from `work` alone; the lock goes with it.

    share: variables that say what share of the machine it has, unless the environment says otherwise.
    """
    env = share | os.environ | {"PYTHONUNBUFFERED": "1"}
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("ab") as output:
        return subprocess.Popen(
            [*FINLORA, *argv],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()] if lock else [],
        )


def end(running: list[Job], number: int) -> None:
    for job in running:
        if job.process and job.process.poll() is None:
            job.process.send_signal(number)
    for job in running:
        if job.process:
            job.process.wait()


def echo(log: Path, start: int) -> int:
    """Show what a log has from this byte on; how many bytes that were."""
    with log.open("rb") as file:
        file.seek(start)
        new = file.read()
    sys.stdout.buffer.write(new)
    sys.stdout.flush()
    return len(new)


def log_of(point: SweepPoint, options: Options) -> Path:
    return output_folder(point.recipe, options.tiny).with_name(f"{point.name}.log")


def why(log: Path, code: int) -> str:
    default = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}, see {shown(log)}"
    return reason(log) or default


def reason(log: Path) -> str | None:
    """Why a point failed, by its log: the first line of an error."""
    if not log.is_file():
        return None
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("error: "):
            return line.removeprefix("error: ").replace(f"{ROOT}/", "").strip()
    return None


def show_points(recipe: Path, file: Path) -> None:
    for point in plan(recipe, file):
        print(f"{point.number:>3}  {point.name:<44}  {changes_text(point.changes)}")


def eval_options(recipe: Path, tasks: str | None, **options: Any) -> dict[str, Any]:
    """Options of `finlora eval` for each point; the test sets are the recipe's task's where none are named."""
    task = (recipe_names.parse_name(recipe.stem) or {}).get("task")
    options["tasks"] = tasks or (task if task in load_tasks() else None)
    return {key: value for key, value in options.items() if value}
