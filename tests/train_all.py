"""Train recipes two steps each on the tiny model: `python -m train_all RECIPE...` prints a JSON line for each.

The same as `make train RECIPE=... TINY=1` for each, but that axolotl's commands run in forked children of one import,
and that fewer rows are held out, whose three evaluations would take longer than the two steps.
"""

import contextlib
import json
import sys
import time

from forked import axolotl_command

from finlora.core.errors import UserError, run
from finlora.data import prepare
from finlora.recipes import names as recipe_names
from finlora.train import run as train


def in_process(command, config, args, local, lock) -> None:
    code, output = axolotl_command(command, str(config), *args)
    if code:
        raise UserError(f"axolotl {command} {config} failed with exit code {code}: {output[-2000:]}")


def with_less_held_out(task, raw, out, options, prepared=prepare.prepare):
    return prepared(task, raw, out, options.model_copy(update={"validation": min(options.validation, 0.05)}))


def main() -> None:
    train.axolotl, prepare.prepare = in_process, with_less_held_out
    for name in sys.argv[1:]:
        started, row = time.perf_counter(), {"recipe": name}
        with contextlib.redirect_stdout(sys.stderr):
            try:
                row["run"] = train.train(recipe_names.find(name), small=True)
            except UserError as error:
                row["error"] = str(error)
        row["seconds"] = round(time.perf_counter() - started, 2)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run(main)
