"""Where runs log: TensorBoard by itself, Weights & Biases and MLflow on demand, and never at the run's expense."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from failures import refuses
from kills import digest, recipe

from fastdora.plugin.checkpoints import MAY_CHANGE
from finlora import cli
from finlora.core.errors import UserError
from finlora.recipes.recipe import Recipe
from finlora.train import tracking

pytestmark = pytest.mark.xdist_group("axolotl")


@pytest.fixture
def nothing_set(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login of this machine's user would be
    return monkeypatch


@pytest.fixture(scope="module")
def logged(tmp_path_factory, tiny_base):
    """A folder with the run `whole/`, which logs to TensorBoard, and a function that trains the same elsewhere."""
    from forked import finish, start

    folder = tmp_path_factory.mktemp("track")

    def train(name: str, *args: str, **env: str) -> str:
        path = recipe(folder, name, tiny_base, save_total_limit=10)
        code, output = finish(start(["train", str(path), "--launcher", "python", *args], env))
        assert code == 0, output[-3000:]
        return output

    train("whole")
    return folder, train


def options(tracker: str | None, out: Path, **keys) -> list[str]:
    return tracking.options(tracker, Recipe(Path("own.yaml"), keys | {"output_dir": str(out)}))


def curve(out, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = out.glob("runs/*/events.*")
    reader = EventAccumulator(str(events.parent)).Reload()
    return {event.step: event.value for event in reader.Scalars(tag)}


def test_every_run_leaves_its_curves_for_tensorboard(logged):
    out = logged[0] / "whole"
    log = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["log"]
    assert curve(out, "train/loss") == pytest.approx({entry["step"]: entry["loss"] for entry in log if "loss" in entry})
    assert len(log) >= 12


def test_wandb_through_axolotls_keys_on_a_run_that_resumes(logged, nothing_set):
    """What TRACK=wandb adds, without a network; the run resumes although it logs elsewhere, to the same adapter."""
    from wandb.errors import WandbCoreNotAvailableError
    from wandb.util import get_core_path

    try:
        get_core_path()
    except WandbCoreNotAvailableError as error:
        pytest.skip(f"Weights & Biases was not tested: {error}")
    folder, train = logged
    out = folder / "wandb"
    out.mkdir()
    shutil.copytree(folder / "whole" / "checkpoint-4", out / "checkpoint-4")
    nothing_set.setenv("WANDB_MODE", "offline")
    nothing_set.setenv("WANDB_SILENT", "true")
    train("wandb", *options("wandb", out), "--no-use-tensorboard")
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["steps_this_run"] == 8
    assert digest(out) == digest(folder / "whole") and not (out / "runs").exists()
    (run,) = out.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in run.read_bytes()


def test_mlflow_through_axolotls_keys(logged, nothing_set):
    pytest.importorskip("mlflow", reason="no mlflow: TRACK=mlflow was not tested")
    folder, train = logged
    out = folder / "mlflow"
    train("mlflow", *options("mlflow", out))
    assert digest(out) == digest(folder / "whole")
    (losses,) = (folder / "mlruns").glob("*/*/metrics/loss")
    assert len(losses.read_text(encoding="utf-8").splitlines()) == 12
    names = [path.read_text(encoding="utf-8") for path in (folder / "mlruns").glob("*/*/tags/mlflow.runName")]
    assert names == ["mlflow"]


def test_a_folder_in_the_way_of_the_curves_does_not_cost_the_run(logged):
    folder, train = logged
    out = folder / "blocked"
    out.mkdir()
    (out / "runs").write_text("in the way", encoding="utf-8")
    output = " ".join(train("blocked").split())
    assert re.search(r"blocked/runs\S* .*could not be written \(.*without TensorBoard", output), output[-3000:]
    assert digest(out) == digest(folder / "whole")


def test_a_disk_that_fills_up_costs_the_curves_alone(tmp_path):
    from forked import torch  # noqa: F401 (its imports, once)
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerState

    from fastdora.plugin import curves

    callback = curves._Curves(SummaryWriter(str(tmp_path)))
    callback.logging_dir = tmp_path
    state = TrainerState(is_world_process_zero=True, global_step=1)
    callback.on_log(None, state, None, logs={"loss": 1.0})
    assert not callback.lost
    events = callback.tb_writer.file_writer.event_writer._async_writer._writer
    with open("/dev/full", "wb") as full:
        events._writer = full
        callback.on_log(None, state, None, logs={"loss": 2.0})
        assert callback.lost
        callback.on_log(None, state, None, logs={"loss": 3.0})
        callback.on_train_end(None, state, None)
        full.raw.close()  # what it still buffers could not be written


def test_what_a_run_logs_is_no_reason_not_to_go_on():
    for key in ("use_tensorboard", "use_wandb", "use_mlflow", "wandb_project", "mlflow_run_name", "wandb_name"):
        assert MAY_CHANGE.fullmatch(key)
    assert not MAY_CHANGE.fullmatch("use_eval") and not MAY_CHANGE.fullmatch("learning_rate")


@pytest.mark.parametrize(
    "tracker, missing, expected",
    [
        ("wandb", None, "TRACK=wandb .*WANDB_API_KEY.* WANDB_MODE=offline"),
        ("wandb", "wandb", r"TRACK=wandb .*pip install wandb$"),
        ("mlflow", "mlflow", r"TRACK=mlflow .*pip install mlflow-skinny$"),
    ],
)
def test_bad_track(tracker, missing, expected, nothing_set, tmp_path):
    find = importlib.util.find_spec
    nothing_set.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError, match=f"^{expected}"):
        options(tracker, tmp_path)


@pytest.mark.parametrize("command", [["train", "ner_r8_dora"], ["sweep", "ner_r8_dora", "rank"]])
def test_a_tracker_that_there_is_not(command):
    with pytest.raises(click.BadParameter, match="'wand' is not one of 'wandb', 'mlflow', 'none'"):
        cli.call([*command, "--track", "wand"])


@pytest.mark.parametrize(
    "keys, missing, words",
    [
        ({"wandb_project": "mine"}, None, ["WANDB_API_KEY", "WANDB_MODE=offline"]),
        ({"use_wandb": True, "wandb_mode": "online"}, None, ["WANDB_API_KEY"]),
        ({"use_wandb": True}, "wandb", ["pip install wandb"]),
        ({"mlflow_experiment_name": "mine"}, "mlflow", ["pip install mlflow-skinny"]),
        ({"use_comet": True}, "comet_ml", ["pip install comet_ml"]),
        ({"trackio_project_name": "mine"}, "trackio", ["pip install trackio"]),
    ],
)
def test_a_recipe_that_logs_to_a_service_that_is_not_at_hand(keys, missing, words, nothing_set):
    find = importlib.util.find_spec
    nothing_set.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with refuses(*words, file="own.yaml", key=next(iter(keys))):
        options(None, Path("outputs/own"), **keys)


def test_a_recipe_that_logs_to_nothing_or_offline(nothing_set):
    options(None, Path("outputs/own"), **{"use_wandb": False, "wandb_project": "", "use_tensorboard": True})
    options(None, Path("outputs/own"), **{"wandb_project": "mine", "wandb_mode": "offline"})
    nothing_set.setenv("WANDB_MODE", "offline")
    options(None, Path("outputs/own"), **{"wandb_project": "mine"})


def test_keys_and_places_come_from_the_environment(nothing_set, tmp_path):
    out = tmp_path / "outputs" / "ner_r8_dora"
    assert options(None, out) == [] and options("none", out) == ["--no-use-tensorboard"]
    nothing_set.setenv("WANDB_API_KEY", "1" * 40)
    assert options("wandb", out) == ["--wandb-project", "finlora", "--wandb-name", "ner_r8_dora"]
    assert os.environ["WANDB_DIR"] == str(out)
    nothing_set.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n", encoding="utf-8")
    nothing_set.setenv("WANDB_PROJECT", "mine")
    assert options("wandb", out)[:2] == ["--wandb-project", "mine"]
    nothing_set.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    nothing_set.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert options("mlflow", out) == [
        "--mlflow-experiment-name",
        "finlora",
        "--mlflow-run-name",
        "ner_r8_dora",
    ]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    nothing_set.delenv("MLFLOW_TRACKING_URI")
    options("mlflow", out)
    assert os.environ["MLFLOW_TRACKING_URI"] == (tmp_path / "outputs" / "mlruns").as_uri()


def test_make_train_says_what_is_missing(command, tmp_path):
    done: subprocess.CompletedProcess = command(
        "finlora",
        "train",
        "ner_r8_dora",
        "--tiny",
        "--track",
        "wandb",
        env={"WANDB_API_KEY": "", "HOME": str(tmp_path)},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    # What axolotl prints at its first import comes before it.
    assert re.match("error: TRACK=wandb .*WANDB_API_KEY", done.stderr.splitlines()[-1])
