"""What runs compute, to the bit: metrics and weight digests of the quickstart and of five steps of every tiny config.

    python tests/golden/behaviour.py --write tests/golden/behaviour.json     # before a change that must not change it
    python tests/golden/behaviour.py tests/golden/behaviour.json             # after it: exit code 1 if a bit differs

With ``--methods`` the quickstart (five minutes) is left out. Processors round matrix products differently, so the file
names the one it was written on; on another kind, write it again at the commit to compare with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from safetensors import safe_open

from dllm_rl.config.load import load_config
from dllm_rl.train import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 5
RENAMED = {"judged": "scored"}  # the last part of metric names that are called otherwise since the file was written
ADDED = {
    "log_ratio_cut",
    "confidence",
    "confident_tokens",
    "rollout_gap",
    "rollout_gap_max",
    "eval/loss",
}  # metrics since


def processor() -> str:
    """The kind of processor, which decides how matrix products round."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def digest_of_run(folder: Path) -> str:
    """SHA-256 of the names and bytes of all tensors in the newest checkpoint."""
    made = hashlib.sha256()
    newest = max((folder / "checkpoints").glob("step-*"))
    for file in sorted(newest.rglob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            for name in sorted(handle.keys()):
                made.update(name.encode() + handle.get_tensor(name).tobytes())
    return made.hexdigest()


def outcome(folder: Path) -> dict[str, Any]:
    """Digest and metrics of a run, without what the machine decides (times, usage)."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.endswith("_s") and not k.startswith("usage/")} for row in rows]
    return {"weights": digest_of_run(folder), "metrics": kept}


def methods(output: Path) -> dict[str, Any]:
    """Five steps of every tiny configuration, from the quickstart's SFT: rewards must differ within groups."""
    common = [f"run.output={output}", "evaluate.limit=32"]
    start = train(load_config(CONFIGS / "sudoku4_sft.yaml", [*common, "run.name=start"])).folder
    found = {"start": outcome(start)}
    for path in sorted((CONFIGS / "methods").glob("*_tiny.yaml")):
        overrides = [*common, f"run.steps={STEPS}", f"run.name={path.stem}"]
        if "masked_sft" not in path.stem:
            overrides.append(f"model.path={start}/checkpoints/step-000300/model")
        if load_config(path).model.teacher is not None:
            overrides.append(f"model.teacher.path={output}/egspo_tiny/checkpoints/step-{STEPS:06d}/model")
        found[path.stem] = outcome(train(load_config(path, overrides)).folder)
        print(f"{path.stem:24} {found[path.stem]['weights'][:16]}", file=sys.stderr)
    return found


def quickstart(output: Path) -> dict[str, Any]:
    """Both runs of the quickstart with seed 0."""
    from dllm_rl.cli.main import main

    assert main(["demo", "--seed", "0", "--output", str(output), "--quiet"]) == 0
    return {phase: outcome(output / f"{phase}-seed0") for phase in ("quickstart-sft", "quickstart-rl")}


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the file under today's names."""
    return {"/".join(RENAMED.get(part, part) for part in name.split("/")): value for name, value in row.items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line per run that differs, with the first metric that does."""
    found = []
    for name, now in after.items():
        if name not in before:
            continue  # a configuration that came later
        then = before[name]
        rows = zip(map(renamed, then["metrics"]), now["metrics"], strict=False)
        keys = [
            k
            for a, b in rows
            for k in sorted(a.keys() | b.keys())
            if k not in ADDED and k.split("/")[-1] not in ADDED and a.get(k) != b.get(k)
        ]
        if keys or then["weights"] != now["weights"] or len(then["metrics"]) != len(now["metrics"]):
            found.append(
                f"{name}: weights {'differ' if then['weights'] != now['weights'] else 'equal'}, first {keys[:3]}"
            )
    return found


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="write the file instead of comparing with it")
    parser.add_argument("--methods", action="store_true", help="leave the quickstart out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = methods(Path(scratch)) | ({} if arguments.methods else quickstart(Path(scratch)))
    if arguments.write:
        found = {"processor": processor(), "runs": runs}
        arguments.file.write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")
        return 0
    before = json.loads(arguments.file.read_text())
    if before["processor"] != processor():
        print(f"written on {before['processor']}, this is {processor()}: bits may differ", file=sys.stderr)
    odd = differences(before["runs"], runs)
    print("\n".join(odd) or f"{len(runs)} runs: the same metrics and the same weights, to the bit")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
