#!/usr/bin/env bash
# Makes the virtual environment: setup.sh TORCH FOLDER READY. READY is touched last, so that the next call finishes a
# set-up that was broken off. TORCH_BUILD=cpu, cu126, cu128 or cuda (PyPI's) takes that build of torch; without it the
# build is the one that this machine's driver runs.
set -euo pipefail
torch=$1 venv=$2 ready=$3 build=${TORCH_BUILD:-}
fail() {
  echo "error: $*" >&2
  exit 1
}
[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
  fail "this is $(uname -s) on $(uname -m); take Linux on x86-64 (on Windows: within WSL 2), others are not supported"
for python in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break || python=
done
[ -n "$python" ] || fail "Python 3.10, 3.11 or 3.12 is needed; install one, or name it: make PYTHON=..."
"$python" -c 'import ensurepip' 2>/dev/null || fail "$python has no venv; run: sudo apt-get install python3-venv"

# Drivers from 580 on run CUDA 13, which PyPI's builds have; those from 525 on run CUDA 12. Blackwell needs 12.8.
IFS=', ' read -r driver capability < <(
  PATH=$PATH:/usr/lib/wsl/lib nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null
) || true
if [ -z "$build" ]; then
  build=cpu
  if [ -n "$driver" ]; then
    [ "${driver%%.*}" -ge 525 ] || fail "NVIDIA's driver $driver is too old; update it to 580, or set TORCH_BUILD=cpu"
    build=cuda
    [ "${driver%%.*}" -ge 580 ] || { [ "$torch" = 2.11.0 ] && build=cu128 || build=cu126; }
    [ "$build" != cu126 ] || [ "${capability%%.*}" -lt 10 ] ||
      fail "CUDA 13 needs NVIDIA's driver 580 and this is $driver; update it, or take CUDA 12.8: make setup TORCH=2.11.0"
  fi
fi
index=https://download.pytorch.org/whl/$build
if [ "$build" != cuda ] &&
  ! "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$index/torch/" 2>/dev/null; then
  [ "$build" = cpu ] || fail "torch's $build is at $index, which cannot be reached; connect, or set TORCH_BUILD=cuda"
  echo "$index cannot be reached: taking PyPI's torch, which brings CUDA" >&2
  build=cuda
fi
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}') need=6
[ "$build" = cpu ] || need=11
[ "$free" -ge "$need" ] || fail "set-up needs $need GB in $PWD and $free GB are free"

log=$venv/setup.log
rm -f "$venv"/.ready-*
version='import sys; print(sys.version_info[:2])'
if "$venv/bin/python" -m pip --version >/dev/null 2>&1 && [ "$("$venv/bin/python" -c "$version")" = "$("$python" -c "$version")" ]; then
  # A package whose installation was broken off has no RECORD yet, and would be taken for a whole one.
  for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
    [ -f "$info/RECORD" ] || rm -rf "$info"
  done
else
  "$python" -m venv --clear "$venv"
fi
# Relative: pip splits this variable at spaces, which the path of the checkout may have. Builds for CUDA 12 need other
# cuda-* packages than those pinned, and name their versions themselves.
export PIP_CONSTRAINT=$venv/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
grep -Ev "$([ "$build" = cuda ] || echo '^cuda-|')^#" "constraints/torch-$torch.txt" >"$venv/constraints.txt"
installer=("$venv/bin/python" -m pip install) from=()
# uv does not read pip's settings: where those name another index, pip it is.
if command -v uv >/dev/null && ! "$venv/bin/python" -m pip config list | grep -Eq 'index-url|find-links|no-index'; then
  installer=(uv pip install --python "$venv/bin/python" --constraint "$venv/constraints.txt")
  [ "$build" = cuda ] || from=(--torch-backend "$build")
elif [ "$build" != cuda ]; then
  torch=$torch+$build from=(--extra-index-url "$index")
fi

# How far it is, while this script runs: packages collected and installed, of those that are pinned.
bar() {
  local total collected installed share filled next=30
  total=$(grep -c '==' "$venv/constraints.txt")
  while sleep 1 >/dev/null 2>&1; do # the last one outlives this script, whose output must end
    collected=$(sed -En 's/^ *(Collecting|Requirement already satisfied:) ([A-Za-z0-9_.-]*).*/\2/p' "$log" | sort -u | wc -l)
    installed=$(find "$venv/lib" -maxdepth 3 -name '*.dist-info' | wc -l)
    share=$((50 * (collected + installed) / total))
    filled=$(printf '%*s' $((share * 2 / 5)) '')
    if [ -t 2 ]; then
      printf '\r[%-40s] %d installed, %d s ' "${filled// /#}" "$installed" "$SECONDS" >&2
    elif ((SECONDS >= next)); then
      echo "$collected packages collected, $installed installed, $SECONDS s" >&2
      next=$((SECONDS + 30))
    fi
  done
}
install() {
  "${installer[@]}" "$@" >>"$log" 2>&1 && return
  grep -i '^ *error' "$log" | tail -n 3 >&2
  fail "set-up stopped ($log has it all); the same command goes on from there"
}
echo "setting up $venv with torch $torch (once); $log has the details" >&2
: >"$log"
bar &
bar=$!
trap 'kill "$bar" 2>/dev/null; [ ! -t 2 ] || echo >&2' EXIT
install pip
install "${from[@]}" "torch==$torch"
install -e '.[dev]'
touch "$ready"
