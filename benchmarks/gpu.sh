#!/usr/bin/env bash
# Everything about a GPU in one go, in under nine minutes: see gpu.py.
#
#     benchmarks/gpu.sh                         on a machine with a GPU
#     benchmarks/gpu.sh --dry --output FOLDER   the same at the smallest sizes, on the processor
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
exec timeout --kill-after 5 538 "${PYTHON:-python}" -W ignore benchmarks/gpu.py "$@"
