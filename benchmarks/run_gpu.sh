#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU is asked for, in under ten minutes: build in place, the information table, the
# tests that need a GPU, the benchmarks on it.
#
#     benchmarks/run_gpu.sh OUTDIR
#
# OUTDIR gets log.txt, benchmarks.json, benchmarks.md and the plots. A stage that fails or runs past its time does not
# stop the others; the summary at the end names it, and the exit status is then 1. PYTHON names the interpreter
# (default python3); it needs torch, setuptools, ninja, pybind11 and the packages of the extras `test` and `bench`.
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
summary=""
status=0

# stage NAME SECONDS COMMAND...: an interrupt at the limit, so that the benchmark still writes its report.
stage() {
  local name=$1 seconds=$2 begin=$SECONDS rc
  shift 2
  echo "== $name: $*"
  timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1
  rc=$?
  case $rc in
    0) summary+="ok      " ;;
    124 | 137) summary+="timeout " ;;
    *) summary+="failed  " ;;
  esac
  [ $rc -eq 0 ] || status=1
  summary+="$name ($((SECONDS - begin)) s, status $rc)"$'\n'
}

main() {
  stage build 230 "$python" setup.py build_ext --inplace
  stage info 30 "$python" -m vqkernels info
  stage tests 120 "$python" -m pytest -m gpu -p no:cacheprovider tests
  stage benchmarks 210 "$python" -m benchmarks --device cuda --out "$out"
  echo "== summary"
  printf '%s' "$summary"
  return $status
}

main | tee "$out/log.txt"
