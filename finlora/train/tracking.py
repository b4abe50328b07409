"""Where `make train` logs beside TensorBoard: what TRACK= adds to axolotl's command, and what it needs."""

import importlib.util
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from finlora.core.errors import UserError

PROJECT = "finlora"
CHOICES = ("wandb", "mlflow", "none")


def check(track: str | None) -> None:
    """UserError where TRACK= is none of its values, or its package or key is missing, before anything loads."""
    if not track or track == "none":
        return
    if track not in CHOICES:
        raise UserError(f"TRACK={track}: choose {', '.join(CHOICES)}; TensorBoard is on without it")
    if not importlib.util.find_spec(track):
        package = {"wandb": "wandb", "mlflow": "mlflow-skinny"}[track]
        raise UserError(f"TRACK={track} needs a package that is not here: {sys.executable} -m pip install {package}")
    if track == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not _wandb_login():
        raise UserError("TRACK=wandb needs WANDB_API_KEY in the environment, or WANDB_MODE=offline to log locally")


def options(track: str | None, out: Path) -> list[str]:
    """Axolotl's options for TRACK=wandb, mlflow or none (not even TensorBoard); local folders go to the environment.

    out: the run's output folder, whose name the run has there. Keys and logins come from the environment or ~/.netrc
    alone. UserError as in `check`.
    """
    check(track)
    if not track:
        return []
    if track == "none":
        return ["--no-use-tensorboard"]
    if track == "wandb":
        os.environ.setdefault("WANDB_DIR", str(out))
        return ["--wandb-project", os.environ.get("WANDB_PROJECT", PROJECT), "--wandb-name", out.name]
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = (out.parent / "mlruns").as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else refused since MLflow 3
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return ["--mlflow-experiment-name", name, "--mlflow-run-name", out.name]


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    from requests.utils import get_netrc_auth

    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(urlsplit(address).hostname and get_netrc_auth(address))
