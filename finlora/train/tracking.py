"""Where `make train` logs beside TensorBoard: what TRACK= adds to axolotl's command, and what each service needs."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from requests.utils import get_netrc_auth

from finlora.core.errors import UserError

PROJECT = "finlora"
CHOICES = ("wandb", "mlflow", "none")


class Service(NamedTuple):
    """A service: its Python module, the package to install, and the recipe keys that turn it on."""

    module: str
    package: str
    keys: tuple[str, str]


SERVICES = {
    "wandb": Service("wandb", "wandb", ("use_wandb", "wandb_project")),
    "mlflow": Service("mlflow", "mlflow-skinny", ("use_mlflow", "mlflow_experiment_name")),
    "comet": Service("comet_ml", "comet_ml", ("use_comet", "comet_project_name")),
    "trackio": Service("trackio", "trackio", ("use_trackio", "trackio_project_name")),
}


def check(track: str | None) -> None:
    """UserError where TRACK= is none of its values, or its package or key is missing, before anything loads."""
    if not track or track == "none":
        return
    if track not in CHOICES:
        raise UserError(f"TRACK={track}: choose {', '.join(CHOICES)}; TensorBoard is on without it")
    check_service(track, f"TRACK={track}", os.environ.get("WANDB_MODE"))


def check_recipe(path: Path, keys: dict[str, Any]) -> None:
    """UserError where a recipe's own keys turn on a service whose package or key is missing.

    keys: the recipe's, with axolotl's options in their places.
    """
    for name, service in SERVICES.items():
        if key := next((key for key in service.keys if keys.get(key)), None):
            mode = keys.get("wandb_mode") or os.environ.get("WANDB_MODE")
            check_service(name, f"{path}: key '{key}'", mode)


def check_service(name: str, asked: str, wandb_mode: str | None) -> None:
    """UserError where the service's package is not installed, or Weights & Biases has no key and is not offline.

    asked: what turned it on, for the error's line.
    """
    service = SERVICES[name]
    if not importlib.util.find_spec(service.module):
        install = f"{sys.executable} -m pip install {service.package}"
        raise UserError(f"{asked} needs a package that is not here: {install}")
    if name == "wandb" and wandb_mode not in ("offline", "disabled") and not _wandb_login():
        raise UserError(f"{asked} needs WANDB_API_KEY in the environment, or WANDB_MODE=offline to log locally")


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
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(urlsplit(address).hostname and get_netrc_auth(address))
