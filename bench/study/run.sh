#!/usr/bin/env bash
# Train and evaluate the study: bench/study/run.sh [SWEEP ...]      (all without; the same command resumes it)
set -euo pipefail
cd "$(dirname "$0")/../.."
name=sentiment_smollm2_bf16_r8_dora at_a_time=${POINTS_PER_GPU:-16}
tests=(TASKS=fpb,fiqa,tfns TESTS=data/study)
[ $# -gt 0 ] || set -- methods ranks bits magnitude confounds prompt
for sweep in "$@"; do
  folder=outputs/sweeps/$name.$sweep
  make sweep RECIPE="data/study/$name.yaml" SWEEP="bench/study/$sweep.yaml" EVAL=1 "${tests[@]}" POINTS_PER_GPU="$at_a_time"
  case $sweep in
    methods)
      make eval MODEL=.cache/SmolLM2-135M-Instruct NAME=base "${tests[@]}" ARGS="--results $folder/results"
      python -m bench.study.full --at-a-time "$at_a_time" ;;
    prompt) # as FinLoRA tests: on the bare context
      printf '%s\n' "$folder"/*.yaml |
        xargs -P "$at_a_time" -I {} make eval RECIPE={} PROMPT=raw "${tests[@]}" ARGS="--results $folder/results" ;;
  esac
done
