"""What every command does with a mistake in its options."""

import subprocess
import sys

import pytest

from finlora.core.paths import ROOT


@pytest.mark.parametrize("option", ["--wdith", "one"])
def test_a_mistyped_option_is_one_line(option):
    done = subprocess.run(
        [sys.executable, "-m", "finlora", "pictures", option], cwd=ROOT, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: ") and option in line and "--help" in line
