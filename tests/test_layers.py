"""The imports of the packages run one way, as pyproject.toml says, and a step back is noticed."""

import ast
import graphlib
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


def test_benchmarks_import_no_tests_and_no_circle():
    imports = {}
    for path in (ROOT / "bench").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        sources = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names = {node.module for node in sources} | {
            f"{node.module}.{one.name}" for node in sources for one in node.names
        }
        names |= {one.name for node in nodes if isinstance(node, ast.Import) for one in node.names}
        imports[f"bench.{path.stem}"] = names
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert {name: names & tests for name, names in imports.items() if names & tests} == {}
    inner = {name: names & imports.keys() for name, names in imports.items()}
    assert list(graphlib.TopologicalSorter(inner).static_order()) and any(inner.values())  # CycleError names a circle
