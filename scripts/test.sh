#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests with coverage, the wheel.
# Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "$0")/environment.sh"
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
codespell dllm_rl algorithms rollouts rewards configs scripts tests docs ./*.md
mypy
# Two processes: tests are single-threaded, and those of a file share what is slow to set up.
python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=90 --durations=15
bash scripts/check_wheel.sh
