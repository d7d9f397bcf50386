#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests with coverage, the wheel.
# Usage: bash scripts/test.sh [--all | pytest arguments]; --all runs the tests marked slow too
set -euo pipefail
. "$(dirname "$0")/environment.sh"
tests="not slow"
if [ "${1:-}" = --all ]; then
  tests=""
elif [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
codespell dllm_rl algorithms rollouts rewards configs scripts tests docs ./*.md
mypy
# Three processes on two cores: tests are single-threaded, many wait for others, and those of a file share what is slow.
python -m pytest -m "$tests" --numprocesses 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-fail-under=90 --durations=15
bash scripts/check_wheel.sh
