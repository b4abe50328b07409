"""What every command does with a mistake in its options."""

import os
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


def test_make_is_told_of_its_own_variables():
    command = [sys.executable, "-m", "finlora", "eval", "--recipe", "ner_r8_dora", "--batch-tokens", "0"]
    for env, option, remedy in (({}, "'--batch-tokens'", "--help"), ({"MAKELEVEL": "1"}, "BATCH_TOKENS=", "make help")):
        done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("error: ") and option in line and remedy in line


def test_bitsandbytes_is_not_imported_before_the_hub_is_turned_off():
    """At its import it would fetch compiled kernels from the hub, or wait for a network that is missing."""
    modules = ", ".join(f"finlora.{name}" for name in ("cli", "demo", "export.chat", "export.serve", "export.publish"))
    program = f"import sys, {modules}; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).returncode == 0
