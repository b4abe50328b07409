"""What a result came from: versions of packages, the commit, the device."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from finlora.core import machine
from finlora.core.paths import ROOT

PACKAGES = ("axolotl", "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def device_name() -> str:
    gpus = machine.gpus()
    return gpus[0][0] if gpus else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_state() -> dict[str, Any]:
    def git(*args: str) -> str | None:
        try:
            # `git status` writes the index anew; killed there (a full disk), it would leave .git/index.lock behind.
            command = ["git", "--no-optional-locks", *args]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD") or os.environ.get("SOURCE_COMMIT") or None  # an image has no .git
    return {"commit": commit, "changed": git("status", "--porcelain") not in ("", None)}
