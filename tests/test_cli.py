"""What every command does with a mistake in its options."""

import subprocess
import sys

import pytest

from tools.cli import ROOT


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--wdith"], "error: unrecognized arguments: --wdith; --help lists the options\n"),
        (["one"], "error: unrecognized arguments: one; --help lists the options\n"),
    ],
)
def test_a_mistyped_option_is_one_line(options, expected):
    done = subprocess.run([sys.executable, "-m", "tools.pictures", *options], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (1, expected, "")
