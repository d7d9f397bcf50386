#!/usr/bin/env bash
# Train a tiny diffusion language model on 4x4 Sudoku, then improve its parallel decoding with reinforcement learning.
# Usage: bash scripts/quickstart.sh [--seed N] [--output DIR] [--json PATH]
set -euo pipefail
. "$(dirname "$0")/environment.sh"
dllm-rl demo "$@"
