#!/usr/bin/env bash
# Writes constraints/torch-TORCH.txt: every package, pinned, for Python 3.10 to 3.12, with CUDA or without.
# A constraint forces no install, so the CUDA packages in it cost a CPU build of torch nothing.
set -euo pipefail
out=constraints/torch-$1.txt
printf 'torch==%s\npip==25.3\nsetuptools\nwheel\n' "$1" |
  uv pip compile -q --universal --python-version 3.10 --no-annotate --no-header --extra dev pyproject.toml - -o "$out.new"
{ echo "# Every package, pinned, for torch $1 on Python 3.10 to 3.12. Made by: make constraints TORCH=$1"; cat "$out.new"; } >"$out"
rm "$out.new"
