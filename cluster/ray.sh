#!/usr/bin/env bash
# Ray: one `make train` on a cluster that this file starts.   cluster/ray.sh RECIPE=sentiment_r8_dora GPUS=8 NODES=2
# on the first node, and on every other node   HEAD=<first node>:6379 cluster/ray.sh. The repository must be in a folder
# that all nodes share, and `ray` on the PATH (pip install 'ray[train]' beside axolotl; it is not among the pinned packages).
set -euo pipefail
cd "$(dirname "$0")/.."
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
if [ -n "${HEAD:-}" ]; then
  exec ray start --address="$HEAD" --block
fi
ray start --head --port=6379
trap 'ray stop' EXIT
RAY_ADDRESS=127.0.0.1:6379 make train RAY=1 "$@"
