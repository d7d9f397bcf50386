"""Memory that `dllm-rl plan` predicts against the resident memory of runs on a CPU; the table of docs/memory.md.

    python scripts/benchmark/plan_memory.py                  # all
    python scripts/benchmark/plan_memory.py NAME ...         # of these

Each run trains two steps in a process of its own. Measured is its peak of resident memory, less what was resident when
everything had been imported and the model not yet loaded. glibc is told to give large blocks back at once
(MALLOC_MMAP_THRESHOLD_), so that what is freed does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LARGE = {"hidden_size": 640, "intermediate_size": 1728, "num_layers": 10, "num_heads": 10, "max_length": 64}
WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_layers": 4, "num_heads": 4, "max_length": 64}
# Name -> family, sizes, number of tokens
MODELS: dict[str, tuple[str, dict[str, int], int]] = {
    "50 M": ("tiny", LARGE, 0),
    "wide": ("tiny", WIDE, 20_000),
    "blocks": ("sdar", LARGE | {"num_kv_heads": 5, "block_size": 4}, 0),
}
BASE: dict[str, Any] = {
    "run": {"name": "run", "steps": 2, "threads": 1},
    "data": {
        "task": {"name": "sudoku4", "train_puzzles": 64, "test_puzzles": 8},
        "prompts_per_step": 8,
        "samples_per_prompt": 4,
    },
    "sampling": {"max_new_tokens": 16, "tokens_per_step": 8, "suppress_tokens": [0, 2]},  # rows fill their canvas
    "algorithm": {"name": "diffu_grpo", "beta": 0.0},
    "rewards": [{"name": "format", "pattern": "[12]$"}, {"name": "sudoku", "weight": 0.0}],
    "reward_pool": {"self_test": 0, "workers": 1},
    "evaluate": {"at_start": False, "at_end": False},
    "diagnostics": {"every_steps": None},
    "learner": {"lr": 1.0e-3},
}
LORA = {"rank": 16, "alpha": 32.0}
SEVERAL = {"lr": 1.0e-3, "tokens_per_microbatch": 512}
RUNS: dict[str, dict[str, Any]] = {
    "full, float32": {},
    "full, bfloat16, a reference, several micro-batches": {
        "model": {"dtype": "bfloat16"},
        "algorithm": {"name": "diffu_grpo", "beta": 0.1},
        "learner": SEVERAL,
    },
    "full, float32, layers recomputed": {"model": {"gradient_checkpointing": True}},
    "LoRA, float32": {"model": {"lora": LORA}},
    "LoRA, bfloat16, several micro-batches": {"model": {"dtype": "bfloat16", "lora": LORA}, "learner": SEVERAL},
    "full, float32, a vocabulary of 20,000": {
        "made": "wide",
        "sampling": {**BASE["sampling"], "top_p": 0.9},
        "rewards": [
            {"name": "format", "pattern": "[\u4e00-\u75ff]$"},
            {"name": "sudoku", "weight": 0.0},
        ],  # half of them
        "learner": {"lr": 1.0e-3, "tokens_per_microbatch": 256},
    },
    "full, float32, block-causal (SDAR)": {"made": "blocks"},
}


def values(name: str, model: Path) -> dict[str, Any]:
    """The configuration of a run."""
    found = {**BASE, **{key: value for key, value in RUNS[name].items() if key not in ("model", "made")}}
    return {**found, "model": {"path": str(model), **RUNS[name].get("model", {})}}


def make(folder: Path, name: str) -> Path:
    """Write the model of a run; returns its folder.

    Args:
        folder: of all models; one that is there already is used again.
        name: of the run.
    """
    from dllm_rl.models.create import create_denoiser
    from dllm_rl.models.loading import save_denoiser
    from dllm_rl.models.tokenizers import character_tokenizer

    chosen = RUNS[name].get("made", "50 M")
    family, sizes, tokens = MODELS[chosen]
    if not (folder / chosen).is_dir():
        tokenizer = character_tokenizer("1234.=" + "".join(chr(0x4E00 + i) for i in range(tokens)))
        save_denoiser(create_denoiser(family, tokenizer, **sizes, seed=0), tokenizer, folder / chosen)
    return folder / chosen


def run(name: str, model: Path, folder: Path) -> None:
    """Train, and print by how many bytes resident memory grew at its peak."""
    import psutil

    from dllm_rl.config.load import validate
    from dllm_rl.driver.choose import choose_parts
    from dllm_rl.models.from_config import load_model
    from dllm_rl.train import train

    found = values(name, model)
    config = validate({**found, "run": {**found["run"], "output": str(folder)}})
    choose_parts(config)
    load_model(config, str(model), weights=False)
    before = psutil.Process().memory_info().rss
    train(config)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before)


def predicted(name: str, model: Path) -> Any:
    """Of the plan: the memory of the one device."""
    from dllm_rl.config.load import validate
    from dllm_rl.config.plugins import build
    from dllm_rl.data.prompts import encode
    from dllm_rl.models.from_config import load_model
    from dllm_rl.planning.memory import memory_of

    config = validate(values(name, model))
    denoiser, tokenizer = load_model(config, str(model), weights=False)
    task = build("tasks", config.data.task.name, config.data.task.options)
    longest = max(len(encode(example, tokenizer).token_ids) for example in task.examples("train"))
    return memory_of(config, denoiser, longest, device="cpu").devices[0]


def measured(name: str, model: Path) -> int:
    """Of a run in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", json.dumps([name, str(model), folder])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []], help="default: all")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.run:
        run(a.run[0], Path(a.run[1]), Path(a.run[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        print("| run | phase of the peak | predicted, MB | measured, MB | predicted / measured |")
        print("|---|---|---|---|---|")
        for name in a.names or RUNS:
            model = make(Path(folder), name)
            device, found = predicted(name, model), measured(name, model)
            ratio = device.peak / found
            print(
                f"| {name} | {device.worst} | {device.peak / 1e6:.0f} | {found / 1e6:.0f} | {ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
