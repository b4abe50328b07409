"""Mutation testing: how many small faults in a module do its own tests in `make test` notice?

python tests/mutants.py [MODULE ...] puts every fault that mutmut knows into a copy of the module, one at a time, and
runs the tests that reach it. It fails where they notice fewer than LEAST of them, and shows each one that they missed.
mutmut forks for a mutant after all imports, where cosmic-ray starts a process: with axolotl's schema ten seconds each.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.9
# The modules and their own tests.
MODULES = {
    "finlora/evaluate/scorers.py": ["tests/test_scorers.py", "tests/test_reading.py"],
    "finlora/evaluate/reading.py": ["tests/test_reading.py"],
    "finlora/evaluate/quantities.py": ["tests/test_reading.py", "tests/test_scorers.py"],
    "finlora/evaluate/statistics.py": ["tests/test_stats.py"],
    "finlora/data/groups.py": ["tests/test_groups.py"],
    "finlora/data/rows.py": ["tests/test_rows.py", "tests/test_layouts.py"],
    "finlora/data/readers.py": ["tests/test_rows.py", "tests/test_layouts.py"],
    "finlora/data/layouts.py": ["tests/test_layouts.py", "tests/test_rows.py"],
    "finlora/data/corrections.py": ["tests/test_corrections.py"],
    "fastdora/plugin/checkpoints.py": ["tests/test_checkpoints.py"],
    "fastdora/plugin/keys.py": ["tests/test_keys.py"],
}
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "outputs", "results", "raw", "prepared", "audit", "mutants"
)


def undecorated(text: str) -> str:
    """mutmut passes decorated functions over: cache them at the end of the module instead, and anew in each fork."""
    cached = re.compile(r"^@((?:functools\.)?cache)\n(?=def (\w+))", re.MULTILINE)
    lines = [
        f"{name} = {cache}({name})\n__import__('os').register_at_fork(after_in_child={name}.cache_clear)\n"
        for cache, name in cached.findall(text)
    ]
    return cached.sub("", text) + "".join(lines)


def measure(module: str, folder: Path) -> tuple[int, list[str]]:
    """How many mutants the module has, and the difference that each one makes that its tests did not notice."""
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND)
    if (ROOT.parent / "shared").is_dir():
        (copy / "shared").symlink_to(ROOT.parent / "shared")  # beside mutmut's own copy, copy/mutants
    source = copy / module
    source.write_text(undecorated(source.read_text(encoding="utf-8")), encoding="utf-8")
    settings = {
        "source_paths": [module],
        "also_copy": sorted(path.name for path in copy.iterdir() if path.name != "shared"),
        "pytest_add_cli_args": ["-m", "not slow"],
        "pytest_add_cli_args_test_selection": MODULES[module],
        # A mutant may take thrice its tests' time and half a minute: some wait for ever, and cores may be busy.
        "timeout_multiplier": 3.0,
        "timeout_constant": 10.0,
    }
    with (copy / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    # conftest.py leaves clearing up to the process that started a worker of pytest-xdist: here it is this one.
    env = {**os.environ, "TMPDIR": str(folder), "PYTEST_XDIST_WORKER": "mutmut", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    os.chdir(copy)  # mutmut has all its paths relative to it
    done = subprocess.run([sys.executable, "-m", "mutmut", "run"], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {module}: mutmut ended with {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    codes = json.loads(Path("mutants", f"{module}.meta").read_text(encoding="utf-8"))["exit_code_by_key"]
    statuses = {name: status_by_exit_code[code] for name, code in codes.items()}
    missed = {name: status for name, status in statuses.items() if status not in ("killed", "timeout")}
    return len(codes), [
        f"{name}: {status}\n{get_diff_for_mutant(name, path=module)}" for name, status in missed.items()
    ]


def main(modules: list[str]) -> int:
    for module in modules:
        if module not in MODULES:
            sys.exit(f"error: MODULE={module}: is not measured; choose one of {', '.join(MODULES)}")
    enough = True
    for module in modules or MODULES:
        with tempfile.TemporaryDirectory(prefix="finlora-mutants-") as folder:
            count, missed = measure(module, Path(folder))
            os.chdir(ROOT)
        for difference in missed:
            print(difference)
        killed = count - len(missed)
        print(f"{module}: {count} mutants, {killed} killed, {len(missed)} survived: {killed / count:.1%}", flush=True)
        enough &= killed / count >= LEAST
    return 0 if enough else f"error: fewer than {LEAST:.0%} killed; add tests for the mutants above"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
