"""`make fuzz SECONDS=300`: the property-based tests on new examples until the time is up.

python tests/fuzz.py [--seconds 300] [--seed N] [FILE...]

Each failure is printed once, as an `@example(...)` to paste above its test. Exit code 1 if there was any.
"""

import argparse
import ast
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FAILING = re.compile(r"(?:Failing test case|Falsifying example): (?P<call>(?P<name>\w+)\(\n(?:.*\n)*?\))")
MARGIN = re.compile(r"^(?:E  |[ |]*\|) ?(?:  )?", re.M)  # of pytest, and of several exceptions in one


def drawn(file: Path) -> dict[str, set[str]]:
    """The file's property-based tests, and the arguments that Hypothesis draws for each."""
    drawn_by = {}
    for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for made in getattr(function, "decorator_list", ()):
            if isinstance(made, ast.Call) and ast.unparse(made.func).split(".")[-1] == "given":
                names = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
                from_right = names[len(names) - len(made.args) :]
                drawn_by[function.name] = {*from_right, *(keyword.arg for keyword in made.keywords)}
    return drawn_by


class Numbers(ast.NodeTransformer):
    """float('nan') for nan, which is how it is printed and not how it is written."""

    def visit_Name(self, name: ast.Name) -> ast.expr:
        return ast.parse(f"float({name.id!r})", mode="eval").body if name.id in ("nan", "inf") else name


def failures(output: str, tests: dict[str, set[str]]) -> dict[str, str]:
    """What pytest's output says: each failed test, and its examples to paste or why there are none."""
    printed = {}
    for match in FAILING.finditer(MARGIN.sub("", output)):
        name, call = match["name"], textwrap.dedent(match["call"])
        try:
            arguments = [word for word in ast.parse(call).body[0].value.keywords if word.arg in tests.get(name, ())]
        except SyntaxError:  # a value whose repr is no Python
            text = call + "\n# is not Python; write what makes these values in an @example"
        else:
            text = "@example(" + ", ".join(ast.unparse(Numbers().visit(word)) for word in arguments) + ")"
            if "data(...)" in text:
                text += "\n# data(...) cannot be pasted: its draws are in the test's output, by the seed"
        printed[f"{name}: {text}"] = f"{name}\n{text}"
    text = " ".join(printed)
    for test in re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+.*)$", output, re.M):
        if re.match(r"\w+", test)[0] not in text:
            printed[test] = test
    return printed


def output_of(command: list[str], seconds: float) -> str:
    """What the command prints; when the time is up it is interrupted, and ends as after Ctrl-C."""
    process = subprocess.Popen(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.communicate()[0]
    except KeyboardInterrupt:  # which has reached the command too
        process.communicate()
        raise


def fuzz(files: list[Path], seconds: float, most: float, draw: random.Random) -> int:
    """Run the files in ever new orders and from new seeds, `most` times at most; how many failures were printed."""
    tests = {file: names for file in files if (names := drawn(file))}
    if not tests:
        sys.exit("error: no property-based test is in these files; name others or none for all")
    deadline, known, runs = time.monotonic() + seconds, set(), 0
    try:
        while True:
            for file in draw.sample(sorted(tests), len(tests)):
                if (left := deadline - time.monotonic()) <= 0 or runs >= most:
                    return len(known)
                seed = draw.randrange(2**32)
                options = ["--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", "-m", "hypothesis", "--tb=short"]
                command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, os.path.relpath(file)]
                output, runs = output_of(command, left), runs + 1
                for key, text in failures(output, tests[file]).items():
                    if key not in known:
                        print(f"\n{os.path.relpath(file)}: {text}\n# python {shlex.join(command[1:])}", flush=True)
                        known.add(key)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        print(f"\n{runs} runs of {len(tests)} files with property-based tests, {len(known)} failures", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="all of tests/ without one")
    parser.add_argument("--seconds", type=float, default=300, help="how long")
    parser.add_argument("--runs", type=int, default=math.inf, help="how many, at most; each draws for one file")
    parser.add_argument("--seed", type=int, help="of the orders and seeds; new each time without it")
    options = parser.parse_args()
    files = [file.resolve() for file in options.files] or sorted(TESTS.glob("test_*.py"))
    sys.exit(bool(fuzz(files, options.seconds, options.runs, random.Random(options.seed))))


if __name__ == "__main__":
    main()
