#!/usr/bin/env bash
# Build the wheel and check that it holds what an installation needs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" .
python - "$folder"/*.whl <<'PY'
import sys, zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
wanted = ["dllm_rl/train.py", "algorithms/trace_rl.py", "rollouts/native.py", "rewards/sudoku.py", "dllm_rl/configs/sudoku4_rl.yaml"]
missing = [name for name in wanted if name not in names]
foreign = sorted({n.split("/")[0] for n in names} - {"dllm_rl", "algorithms", "rollouts", "rewards"})
foreign = [n for n in foreign if not n.endswith(".dist-info")]
if missing or foreign:
    sys.exit(f"wheel: missing {missing}, foreign {foreign}")
print(f"wheel: {len(names)} files, complete")
PY
