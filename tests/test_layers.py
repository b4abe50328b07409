"""The imports of the packages run one way, as pyproject.toml says, and a step back is noticed."""

import shutil
import subprocess
import sys

from finlora.core.paths import ROOT


def lint(folder) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_imports_run_one_way():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_step_back_is_named(tmp_path):
    for package in ("finlora", "fastdora"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "finlora" / "core" / "files.py").open("a", encoding="utf-8") as file:
        file.write("from finlora.train import tiny\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and "finlora.core.files -> finlora.train.tiny" in done.stdout, done.stdout + done.stderr
