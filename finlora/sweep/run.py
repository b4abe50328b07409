"""Sweep a recipe: a run for each point of a sweep file, then one table and one plot (`make sweep`).

finlora sweep sentiment_r8_dora rank [--gpus 4] [--eval] [--point 3] [--list] [-- axolotl's own options]

A sweep file is axolotl's: `key: [values]` in every combination, and under `_` a list of keys that change together. What
axolotl does with it (`axolotl train --sweep`) shuffles the points into numbered folders, keeps no map, collects nothing
and hides failures; here each point is a whole recipe in outputs/sweeps/<recipe>.<sweep>/ that `make train` trains.
"""

import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import yaml

from fastdora.plugin import safety
from fastdora.plugin.keys import RecipeError, check_keys, read_recipe
from finlora.core import files, machine
from finlora.core.errors import UserError, did_you_mean
from finlora.core.files import replacing
from finlora.core.paths import ROOT
from finlora.data.tasks import load_tasks
from finlora.data.test_sets import choose, read_set
from finlora.evaluate import forgetting, runner
from finlora.evaluate.results import show
from finlora.recipes import bases, memory
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes.rules import validate
from finlora.sweep import report as sweep_report
from finlora.train import run as train
from finlora.train import runs, tracking

SWEEPS = recipe_names.RECIPES / "sweeps"
OWN = ("output_dir", "dataset_prepared_path", "plugins")  # what a sweep may not vary
IN_NAME = {key for part in ("bits", "r", "alpha", "method") for key in recipe_names.DECIDED_BY[part]}
FINLORA = (sys.executable, "-m", "finlora")  # what trains and evaluates a point, in a process of its own
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def sweep(
    recipe: Path,
    file: Path,
    *,
    small: bool = False,
    force: bool = False,
    gpus: int = 1,
    point: int | None = None,
    ask: list[str] | None = None,
    track: str | None = None,
    args: list[str] | None = None,
) -> dict[str, Any]:
    """Train the points that are not trained yet, write table.md and index.html, and return what they show.

    small: on the tiny base model. force: train (and ask) anew. gpus: points at a time, each on a GPU of its own. point:
    only this one, counted from 1 (an array job runs one a task). ask: evaluate too, with these options of `finlora
    eval`. track, args: as in finlora.train.run. A point that fails leaves the others alone; at the
    end UserError has its line.
    """
    args = args or []
    points = plan(recipe, file)
    for key in runs.option_values(args):
        if key in train.NAMED or any(key in entry["changes"] for entry in points):
            raise UserError(f"ARGS={shlex.join(args)}: {key} is what the points differ by; change {show(file)}")
    if point is not None and not 1 <= point <= len(points):
        raise UserError(f"POINT={point}: {show(file)} has points 1 to {len(points)}; LIST=1 shows them")
    if ask is not None:
        check_asked(ask, small)
    tracking.check(track)
    folder = runs.output_folder(points[0]["recipe"], small).parent
    # Taken before a file is written, and with TINY=1 too: the recipes that another sweep still has to train lie there.
    # The tasks of an array (POINT=) share the folder.
    with runs.folder_lock(points[0]["path"].parent) if point is None else nullcontext() as lock:
        mark_folder(folder, recipe, file)
        for entry in points:
            entry["out"] = runs.output_folder(entry["recipe"], small)
            write(entry, recipe)
        chosen = points if point is None else [points[point - 1]]
        jobs = [jobs_of(entry, folder, small=small, force=force, ask=ask, track=track, args=args) for entry in chosen]
        todo = [(entry, commands) for entry, commands in zip(chosen, jobs, strict=True) if commands]
        print(f"{show(file)} on {recipe.stem}: {len(points)} points, {len(todo)} to run", flush=True)
        failed, blocked = {}, None
        try:
            gpu_slots = slots(gpus, points[0], small) if todo else []
        except UserError as error:
            blocked = error  # what is trained is shown all the same: an array's table may be made where no GPU is
        if todo and not blocked:
            failed = work(todo, gpu_slots, lock)
        for entry in points:
            entry["run"] = train.finished_run(entry["path"], small, args)
            entry["failed"] = failed.get(entry["name"]) or (None if entry["run"] else reason(log_of(entry)))
        shown = {}
        if any(entry["run"] for entry in points):
            shown = sweep_report.report(recipe, file, points, folder)
        if blocked:
            raise blocked
        if failed:
            raise UserError("\nerror: ".join(f"{name}: {text}" for name, text in failed.items()))
        return shown


def find(name: str) -> Path:
    """The file of a sweep given by its name in recipes/sweeps or by a path. UserError lists what there is."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SWEEPS / f"{name}.yaml"
    if name and path.is_file():
        return path.absolute()
    known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    hint = did_you_mean(Path(name).stem, known)
    raise UserError(f"SWEEP={name}: no such sweep; {hint}there are {', '.join(known)}, and any YAML file by its path")


def plan(recipe: Path, file: Path) -> list[dict[str, Any]]:
    """The points of a sweep in its file's order: number, name, changes, recipe (whole) and path of its file.

    Raises UserError for a key or a value that axolotl does not know, and for points that are equal.
    """
    base = recipes.load(recipe).keys
    schema = recipes.axolotl_schema(base["plugins"])
    folder = ROOT / "outputs" / "sweeps" / f"{recipe.stem}.{file.stem}"
    points: list[dict[str, Any]] = []
    for number, changes in enumerate(read(file), 1):
        merged = base | dict(
            sorted(changes.items(), key=str)
        )  # base's order first: the text must not follow the sweep file's
        merged = {key: value for key, value in merged.items() if value is not None}
        try:
            safety.check(merged, show(file))
            check_keys(merged, show(file), schema)
        except RecipeError as error:
            raise UserError(str(error)) from error
        validate(f"{show(file)}: point {number}", merged, recipes.Recipe(recipe, merged).layers)
        name = name_of(recipe.stem, base, merged)
        for other in points:
            if alike(other["merged"], merged):
                raise UserError(
                    f"{show(file)}: points {other['number']} and {number} are equal ({in_text(changes)}); remove one"
                )
            if other["name"] == name:
                raise UserError(f"{show(file)}: points {other['number']} and {number} would both be {name}; rename one")
        out = (folder / name).relative_to(ROOT)
        whole = merged | {"output_dir": str(out), "dataset_prepared_path": str(out / "tokenised")}
        path = folder / f"{name}.yaml"
        try:
            recipes.check_name(recipes.Recipe(path, whole))
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UserError(f"{show(file)}: point {number} ({in_text(changes)}) would be {name}: {reason}") from error
        point = {"number": number, "name": name, "changes": changes, "merged": merged, "recipe": whole, "path": path}
        points.append(point | {"differs": {key: merged.get(key) for key in differing(base, merged)}})
    return points


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two recipes train the same: the order of the target modules changes nothing."""
    key = "lora_target_modules"
    return one | {key: sorted(one[key])} == other | {key: sorted(other[key])}


def read(file: Path) -> list[dict[str, Any]]:
    """What each point of a sweep file changes, in the file's order: axolotl's `generate_sweep_configs`, unshuffled."""
    try:
        content = read_recipe(file)
    except RecipeError as error:
        raise UserError(str(error).replace(str(file), show(file))) from error
    pairs = content.pop("_", None)
    for key, values in [*content.items(), *([] if pairs is None else [("_", pairs)])]:
        if not isinstance(values, list):
            raise UserError(f"{show(file)}: key '{key}' is {values!r}; write a list of values")
        if not values:
            raise UserError(f"{show(file)}: key '{key}': the list is empty; give it values or remove the key")
    for number, pair in enumerate(pairs or [], 1):
        if not isinstance(pair, dict) or not pair:
            raise UserError(f"{show(file)}: key '_': entry {number} is {pair!r}; write keys with their values")
    for key in [*content, *(key for pair in pairs or [] for key in pair)]:
        if key in OWN:
            raise UserError(f"{show(file)}: key '{key}' is the sweep's own; remove it")
    if twice := [key for key in content if any(key in pair for pair in pairs or [])]:
        raise UserError(f"{show(file)}: key '{twice[0]}' is below '_' too; keep one")
    combinations = itertools.product(*content.values())
    return [
        numbers(dict(zip(content, values, strict=True)) | pair) for values in combinations for pair in pairs or [{}]
    ]


def numbers(value: Any) -> Any:
    """The value with 1e-4 as a number: YAML 1.1 reads it as text."""
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def name_of(stem: str, base: dict[str, Any], recipe: dict[str, Any]) -> str:
    """What differs from the base recipe: in the grammar of recipes' names where that can say it, then as .key-value."""
    parts = recipe_names.parse_name(stem)
    rest = [key for key in differing(base, recipe) if not (parts and key in IN_NAME)]
    first = recipe_names.compose_name(parts["task"], recipe) if parts else stem
    return ".".join([first, *(f"{key}-{in_name(recipe.get(key))}" for key in rest)])


def differing(base: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    return [key for key in sorted(base.keys() | recipe.keys()) if base.get(key) != recipe.get(key)]


def in_name(value: Any) -> str:
    """A value as a part of a file's name; a digest of what is too long or has other characters."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(item, dict) and {"name", "lr"} <= item.keys() for item in items):
        items = [part for group in items for part in (group["name"], group["lr"])]
    text = "-".join(item if isinstance(item, str) else json.dumps(item, default=str) for item in items)
    if not re.fullmatch(r"[\w.-]{1,80}", text):
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return text


def in_text(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {json.dumps(value, default=str)}" for key, value in changes.items())


def write(point: dict[str, Any], recipe: Path) -> None:
    """Write a point's recipe. Its text is a part of the run's identity, so it says nothing that an edit may change."""
    text = f"# {show(recipe)}{' with ' if point['differs'] else ''}{in_text(point['differs'])}\n"
    text += yaml.safe_dump(point["recipe"], sort_keys=False, width=120)
    if not point["path"].is_file() or point["path"].read_text(encoding="utf-8") != text:
        with replacing(point["path"]) as file:
            file.write(text)


def jobs_of(
    point: dict[str, Any],
    folder: Path,
    *,
    small: bool,
    force: bool,
    ask: list[str] | None,
    track: str | None,
    args: list[str],
) -> list[list[str]]:
    """The commands that a point still needs, as arguments of `finlora`: train, evaluate, one of them or none."""
    tiny, anew = ["--tiny"] if small else [], ["--force"] if force else []
    logging = ["--track", track] if track else []
    commands = []
    run_json = None if force else train.finished_run(point["path"], small, args)
    if not run_json:
        commands.append(["train", str(point["path"]), *tiny, *anew, *logging, "--", *args])
    if ask is not None:
        options = ["--recipe", str(point["path"]), "--results", str(folder / "results"), *ask, *tiny]
        before = files.read_json(folder / "results" / sweep_report.subject(point["name"], small) / "run.json")
        stale = before and (not run_json or before.get("adapter_sha256") != run_json["adapter"]["sha256"])
        asked = request(ask, recipe=str(point["path"]), results=folder / "results", tiny=small)
        if not run_json or stale or not answered(asked):
            commands.append(["eval", *options, *(["--force"] if stale else anew)])
    return commands


def mark_folder(folder: Path, recipe: Path, file: Path) -> None:
    """Make the folder that of this recipe and sweep file; UserError where it is that of others of the same names."""
    mine = {"recipe": show(recipe), "sweep": show(file)}
    before = files.read_json(folder / "sweep.json")
    for key, path in (("recipe", recipe), ("sweep", file)) if isinstance(before, dict) else ():
        other = ROOT / str(before.get(key))
        if other.is_file() and not other.samefile(path):
            raise UserError(f"{show(folder)}: holds the sweep of {before[key]}; give {mine[key]} another name")
    if before != mine:
        with replacing(folder / "sweep.json") as mark:
            json.dump(mine, mark)
            mark.write("\n")


def check_asked(ask: list[str], small: bool) -> None:
    """UserError before anything is trained where a test set is not known or not there."""
    wanted = request(ask)
    for name in forgetting.choose(re.split(r"[,\s]+", wanted.tasks or "sentiment"), choose):
        if not small and name not in forgetting.TASKS:
            read_set(name)


def request(ask: list[str], **others: Any) -> runner.Request:
    """What these options of `finlora eval` ask for: --tasks, --limit and --labels, each with its value."""
    fields: dict[str, Any] = {name.removeprefix("--"): value for name, value in zip(ask[::2], ask[1::2], strict=True)}
    if "limit" in fields:
        fields["limit"] = int(fields["limit"])
    return runner.Request(**fields, **others)


def answered(wanted: runner.Request) -> bool:
    evaluation = runner.resolve(wanted)
    folder = wanted.results / evaluation.name
    return all(runner.is_answered(folder / name, evaluation) for name in evaluation.sets)


def slots(gpus: int, point: dict[str, Any], small: bool) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each point at a time; None leaves it as it is. UserError where GPUs are missing."""
    shape = None if small else bases.shape(point["recipe"]["base_model"])
    if shape and not memory.on_cpu(shape) and len(machine.gpus()) < gpus:
        here = len(machine.gpus())
        raise UserError(
            f"GPUS={gpus}: a point needs a GPU and {here or 'none'} {'are' if here > 1 else 'is'} here; TINY=1 tries "
            "the sweep on a tiny model"
        )
    if gpus == 1:
        return [None]
    if not (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
        return [str(number) for number in range(gpus)]
    if len(visible.split(",")) < gpus:
        raise UserError(f"GPUS={gpus}: CUDA_VISIBLE_DEVICES={visible} shows fewer; name {gpus} there, or take GPUS=1")
    return visible.split(",")[:gpus]


def work(todo: list[tuple[dict[str, Any], list[list[str]]]], free: list[str | None], lock: IO | None) -> dict[str, str]:
    """Run each point's commands, at most one point in each slot; why each one that failed did, by its name.

    With one slot its output is shown as it comes, with several each point has a line when it begins and ends. All of it
    is kept in <point>.log. Ctrl-C lets each run save a checkpoint.
    """
    waiting, running, failed = list(todo), [], {}
    alone, total = len(free) == 1, len(todo)
    try:
        while waiting or running:
            while waiting and free:
                point, commands = waiting.pop(0)
                gpu, log = free.pop(0), log_of(point)
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_bytes(b"")
                place = f" on GPU {gpu}" if gpu is not None else ""
                print(f"[{total - len(waiting)}/{total}] {point['name']}{place}: {show(log)}", flush=True)
                job = {"point": point, "left": commands[1:], "gpu": gpu, "log": log, "shown": 0}
                running.append(job | {"process": start(commands[0], gpu, log, lock), "began": time.monotonic()})
            time.sleep(0.1)
            for job in list(running):
                code = job["process"].poll()
                if alone:
                    job["shown"] += echo(job["log"], job["shown"])
                if code == 0 and job["left"]:
                    job["process"] = start(job["left"].pop(0), job["gpu"], job["log"], lock)
                elif code is not None:
                    running.remove(job)
                    free.append(job["gpu"])
                    name = job["point"]["name"]
                    if code:
                        failed[name] = why(job["log"], code)
                    seconds = time.monotonic() - job["began"]
                    print(f"{name}: {f'failed: {failed[name]}' if code else 'done'} ({seconds:.0f} s)", flush=True)
    except (KeyboardInterrupt, SystemExit):
        print("\ninterrupted; the same command resumes from here", file=sys.stderr, flush=True)
        try:
            end(running, signal.SIGTERM)
        except KeyboardInterrupt:
            end(running, signal.SIGINT)
        raise
    return failed


def start(argv: list[str], gpu: str | None, log: Path, lock: IO | None) -> subprocess.Popen:
    """`finlora argv...` with its output in the log. Ctrl-C reaches it from `work` alone; the lock goes with it."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
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


def end(running: list[dict[str, Any]], number: int) -> None:
    for job in running:
        if job["process"].poll() is None:
            job["process"].send_signal(number)
    for job in running:
        job["process"].wait()


def echo(log: Path, start: int) -> int:
    """Show what a log holds from this byte on; how many bytes that were."""
    with log.open("rb") as file:
        file.seek(start)
        new = file.read()
    sys.stdout.buffer.write(new)
    sys.stdout.flush()
    return len(new)


def log_of(point: dict[str, Any]) -> Path:
    return point["out"].with_name(f"{point['name']}.log")


def why(log: Path, code: int) -> str:
    default = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}, see {show(log)}"
    return reason(log) or default


def reason(log: Path) -> str | None:
    """Why a point failed, by its log: its first error line, or the line above one that names no reason."""
    if not log.is_file():
        return None
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("error: "):
            if train.SEE_ABOVE in line and number:
                line = lines[number - 1]
            return line.removeprefix("error: ").replace(f"{ROOT}/", "")
    return None


def show_points(recipe: Path, file: Path) -> None:
    for point in plan(recipe, file):
        print(f"{point['number']:>3}  {point['name']:<44}  {in_text(point['changes'])}")


def options(recipe: Path, tasks: str | None, limit: int | None, labels: str | None) -> list[str]:
    """Options of `finlora eval` for each point; the test sets are the recipe's task's where none are named."""
    task = (recipe_names.parse_name(recipe.stem) or {}).get("task")
    asked = {"--tasks": tasks or (task if task in load_tasks() else None), "--limit": limit, "--labels": labels}
    return [part for option, value in asked.items() if value for part in (option, str(value))]
