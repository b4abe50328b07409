"""Where `make train` logs beside TensorBoard: what TRACK= adds to axolotl's command, and what each service needs."""

import importlib.util
import os
import sys
from typing import NamedTuple
from urllib.parse import urlsplit

from requests.utils import get_netrc_auth

from finlora.core.errors import UserError
from finlora.recipes.recipe import Recipe

PROJECT = "finlora"


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


def check(tracker: str | None) -> None:
    """UserError where the package or the key of TRACK='s service is missing, before anything loads."""
    if tracker in SERVICES:
        check_service(tracker, f"TRACK={tracker}", os.environ.get("WANDB_MODE"))


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


def options(tracker: str | None, recipe: Recipe) -> list[str]:
    """Axolotl's options for TRACK=wandb, mlflow or none (not even TensorBoard); local folders go to the environment.

    The run is named as the recipe's output folder. Keys and logins come from the environment or ~/.netrc alone.
    UserError where a service that TRACK= or the recipe turns on lacks its package or key.
    """
    check(tracker)
    for name, service in SERVICES.items():
        if key := next((key for key in service.keys if recipe.settings.get(key)), None):
            mode = recipe.settings.get("wandb_mode") or os.environ.get("WANDB_MODE")
            check_service(name, recipe.where(key), mode)
    out = recipe.output_folder
    if tracker == "none":
        return ["--no-use-tensorboard"]
    if tracker == "wandb":
        os.environ.setdefault("WANDB_DIR", str(out))
        return ["--wandb-project", os.environ.get("WANDB_PROJECT", PROJECT), "--wandb-name", out.name]
    if tracker == "mlflow":
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ["MLFLOW_TRACKING_URI"] = (out.parent / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else refused since MLflow 3
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        return ["--mlflow-experiment-name", name, "--mlflow-run-name", out.name]
    return []


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(urlsplit(address).hostname and get_netrc_auth(address))
