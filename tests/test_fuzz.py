"""`make fuzz` finds a false property and prints an example of it that can be pasted."""

import ast
import subprocess
import sys

from fuzz import TESTS

PROFILE = """
import hypothesis
hypothesis.settings.register_profile("fuzz", database=None, deadline=None, max_examples=100)
"""
FALSE = """
import pytest
from hypothesis import example, given, strategies as st

@pytest.mark.parametrize("limit", [3])
@given(text=st.text(), numbers=st.lists(st.floats(allow_nan=True)))
def test_false(limit, text, numbers):
    assert len(text) < limit or not numbers, "a ) bracket"

@given(st.integers())
def test_two_ways(number):
    if number > 9:
        raise ValueError("large")
    if number < -9:
        raise TypeError("small")

@given(st.integers())
def test_true(number):
    assert number == number

def test_without_examples():
    raise AssertionError("no property-based test: it is not run")
"""


def fuzz(file, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TESTS / "fuzz.py"), *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_false_property_is_printed_as_an_example_to_paste(tmp_path):
    (tmp_path / "conftest.py").write_text(PROFILE, encoding="utf-8")
    file = tmp_path / "test_false.py"
    file.write_text(FALSE, encoding="utf-8")
    done = fuzz(file, "--runs", "1", "--seed", "1")
    assert done.returncode == 1 and "3 failures" in done.stdout, done.stdout + done.stderr
    assert "test_true" not in done.stdout and "test_without_examples" not in done.stdout
    examples = [line for line in done.stdout.splitlines() if line.startswith("@example(")]
    (false,) = [line for line in examples if "text=" in line]
    given = {word.arg: word.value for word in ast.parse(false[1:]).body[0].value.keywords}
    assert set(given) == {"text", "numbers"} and len(ast.literal_eval(given["text"])) == 3
    assert sorted(set(examples) - {false}) == ["@example(number=-10)", "@example(number=10)"]
    # Pasted, they fail before any example is drawn.
    pasted = FALSE.replace("@given(text", f"{false}\n@given(text")
    file.write_text(pasted.replace("max_examples=100", "max_examples=1"), encoding="utf-8")
    again = subprocess.run([sys.executable, "-m", "pytest", "-q", str(file)], capture_output=True, text=True)
    assert "explicit example" in again.stdout and "test_false[3]" in again.stdout, again.stdout


def test_true_properties_end_when_the_time_is_up(tmp_path):
    (tmp_path / "conftest.py").write_text(PROFILE, encoding="utf-8")
    file = tmp_path / "test_true.py"
    file.write_text(
        "from hypothesis import given, strategies as st\n@given(st.text())\ndef test_true(text):\n    pass\n"
    )
    done = fuzz(file, "--seconds", "2")
    assert done.returncode == 0 and "1 files with property-based tests, 0 failures" in done.stdout, done.stdout
    file.write_text("def test_without_examples():\n    pass\n", encoding="utf-8")
    refused = fuzz(file)
    assert refused.returncode == 1 and refused.stderr.startswith("error: no property-based test"), refused.stderr
