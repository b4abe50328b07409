"""What `finlora eval ARGV...` asks of the runner, without running it."""

from enum import Enum

import typer
from click.core import ParameterSource

from finlora import cli
from finlora.evaluate.evaluation import Request


def request(argv: list[str]) -> Request:
    """The command's own options, read by itself; `results` only where it is given, so that a test may move it."""
    context = typer.main.get_command(cli.app).commands["eval"].make_context("eval", list(argv))
    fields = {name: value.value if isinstance(value, Enum) else value for name, value in context.params.items()}
    if context.get_parameter_source("results") == ParameterSource.DEFAULT:
        del fields["results"]
    return Request(**fields)
