#!/usr/bin/env bash
# Makes the virtual environment: setup.sh TORCH FOLDER READY. READY is touched last, so a broken set-up is done again.
set -euo pipefail
torch=$1 venv=$2 ready=$3
for python in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break || python=
done
[ -n "$python" ] || { echo "error: Python 3.10, 3.11 or 3.12 is needed; install one, or name it: make PYTHON=..." >&2; exit 1; }
"$python" -c 'import ensurepip' 2>/dev/null ||
  { echo "error: $python has no venv; run: sudo apt-get install python3-venv" >&2; exit 1; }
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge 6 ] || { echo "error: set-up needs 6 GB in $PWD and $free GB are free" >&2; exit 1; }
echo "setting up $venv with torch $torch (once)" >&2
# Relative: pip splits this variable at spaces, which the path of the checkout may have.
export PIP_CONSTRAINT=constraints/torch-$torch.txt PIP_DISABLE_PIP_VERSION_CHECK=1
rm -f "$venv"/.ready-*
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q pip
"$venv/bin/python" -m pip install -q "torch==$torch"
"$venv/bin/python" -m pip install -q -e '.[dev]'
touch "$ready"
