#!/usr/bin/env bash
# vLLM in an environment of its own: setup_vllm.sh FOLDER. It pins another torch than axolotl does.
set -euo pipefail
venv=$1 version=0.33.0
for python in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break || python=
done
[ -n "$python" ] || { echo "error: Python 3.10 to 3.13 is needed; install one, or name it: make vllm PYTHON=..." >&2; exit 1; }
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge 12 ] || { echo "error: vLLM needs 12 GB in $PWD and $free GB are free" >&2; exit 1; }
echo "setting up vLLM $version in $venv" >&2
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q "vllm==$version"
"$venv/bin/python" -c "import vllm; print('ready: vllm', vllm.__version__)"
