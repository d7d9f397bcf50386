"""The training runs behind the claims: one shared start per seed, then equal budgets. See claims.py."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dllm_rl.cli.output import write_json
from dllm_rl.config.load import load_config
from dllm_rl.reports.run_folder import RunFolder
from dllm_rl.train import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 100

# Fixed before any of the seeds of claims.py was run, and the same for all methods unless a line says otherwise: the
# optimiser, its learning rate and the decoding of the quickstart (sudoku4_rl.yaml), 16 prompts x 8 samples a step.
# On another seed it was tried how long runs take, and seen that GDPO loses the start's accuracy at this rate.
COMMON = [
    f"run.steps={STEPS}",
    "data.prompts_per_step=16",
    "evaluate.every_steps=null",
    "evaluate.at_start=false",
    "evaluate.tokens_per_step=[1, 4]",
    "evaluate.limit=1024",
    "diagnostics.every_steps=50",
]
FAST = [
    "sampling.strategy={name: confidence_threshold, threshold: 0.9}",
    "evaluate.tokens_per_step=[1]",  # not read by this strategy
]
HARD = [
    "data.task={name: sudoku4, min_holes: 10, max_holes: 12, train_puzzles: 4096, test_puzzles: 512}",
    "evaluate.tokens_per_step=[4]",
    "evaluate.every_steps=25",
]
POLICY = [
    "sampling.strategy={name: learned, width: 64}",
    "sampling.temperature=0",
    "learner.lr=1.0e-3",  # a network of its own, from scratch
    "learner.updates_per_step=2",  # the paper's
    "evaluate.tokens_per_step=[1]",
]
GENTLE = "learner.lr=3.0e-5"  # on the other seed these lose the start's accuracy at the common rate
RUNS: Mapping[str, Sequence[str]] = {
    "trace_rl": ["algorithm={name: trace_rl, advantage: group_mean}"],
    "coupled_grpo": ["algorithm={name: coupled_grpo}"],
    "diffu_grpo": ["algorithm={name: diffu_grpo}"],
    "espo": ["algorithm={name: espo}"],
    "gdpo": ["algorithm={name: gdpo}", "learner.lr=1.0e-5"],  # its paper: a tenth of diffu-GRPO's, else it diverges
    "just_grpo": [
        "algorithm={name: just_grpo, reduction: token_mean}",  # the scale of the others' losses
        "sampling.strategy={name: left_to_right}",
        "sampling.tokens_per_step=1",
        "evaluate.strategy={name: low_confidence}",
        "evaluate.tokens_per_step=[1, 2, 4]",
    ],
    "igpo": [*HARD, "algorithm={name: igpo, reserve: 0, chunk: [2, 4]}"],
    # Twice the samples: hinted rollouts at most double the first's, so this has at least as many.
    "grpo, hard": [*HARD, 'algorithm={name: "controls:WithoutHints", reserve: 0}', "data.samples_per_prompt=16"],
    "spg": ["algorithm={name: spg}", GENTLE],
    "spg, lower bound": ["algorithm={name: spg, mixture: 0.0}", GENTLE],
    "wd1": ["algorithm={name: wd1, reduction: token_mean}", GENTLE],  # the scale of the others' losses
    "diffu_grpo, gentle": ["algorithm={name: diffu_grpo}", GENTLE],
    "cj_grpo": ["algorithm={name: cj_grpo}"],
    "d2": ["algorithm={name: d2, segments: 4}"],  # of 4 forwards: the whole trajectory
    "d2, 2 segments": ["algorithm={name: d2, segments: 2}"],
    "d2, 1 segment": ["algorithm={name: d2, segments: 1}"],
    "bgpo": ["algorithm={name: bgpo, draws: 8}", "learner.lr=1.0e-5"],
    "bgpo, 2 draws": ["algorithm={name: bgpo, draws: 2}", "learner.lr=1.0e-5"],
    "unigrpo, 4 updates": ["algorithm={name: unigrpo}", "learner.updates_per_step=4", GENTLE],
    "diffu_grpo, 4 updates": ["algorithm={name: diffu_grpo}", "learner.updates_per_step=4", GENTLE],
    "mdpo": [
        "algorithm={name: mdpo}",
        "sampling.tokens_per_step=16",  # a forward predicts the whole board, of which 4 cells are committed
        "rollout.rollouter={name: denoising_steps, tokens_per_step: 4}",
    ],
    # For --explain: thought of after the first look. Is it the learning rate? Is it that
    # hint tokens are filtered out of right rows, while the same cells of wrong rows are pushed down?
    "espo, tenth of the rate": ["algorithm={name: espo}", "learner.lr=1.0e-5"],
    "diffu_grpo, tenth of the rate": ["algorithm={name: diffu_grpo}", "learner.lr=1.0e-5"],
    "igpo, tenth of the rate": [*HARD, "algorithm={name: igpo, reserve: 0, chunk: [2, 4]}", "learner.lr=1.0e-5"],
    "igpo, all hint tokens": [*HARD, "algorithm={name: igpo, reserve: 0, chunk: [2, 4], hint_tokens: 1.0}"],
    "lightning_rl": [*FAST, "algorithm={name: lightning_rl}"],
    "lightning_rl, no anchor": [*FAST, "algorithm={name: lightning_rl, anchor: 0.0}"],
    "policy": [*POLICY, "algorithm={name: unmasking_policy}"],
    "policy, experts": [
        *POLICY,
        "algorithm={name: unmasking_policy, experts: [0.7, 0.9], expert_block_size: 4}",
    ],
}


def base_model(output: Path, seed: int) -> Path:
    """Where the shared start of a seed is: the model of sudoku4_sft.yaml."""
    config = load_config(CONFIGS / "sudoku4_sft.yaml", [f"run.output={output}", f"run.name=base-seed{seed}"])
    return output / config.run.name / "checkpoints" / f"step-{config.run.steps:06d}" / "model"


def run_base(output: Path, seed: int) -> dict[str, Any]:
    """Train the shared start of a seed."""
    if not base_model(output, seed).exists():
        common = [f"run.seed={seed}", f"run.output={output}", f"run.name=base-seed{seed}", "evaluate.at_end=false"]
        train(load_config(CONFIGS / "sudoku4_sft.yaml", common))
    return {}


def folder_of(output: Path, name: str, seed: int) -> Path:
    """The run folder of a run."""
    return output / ("".join(c if c.isalnum() else "-" for c in name).replace("--", "-") + f"-seed{seed}")


def run_one(output: Path, name: str, seed: int) -> dict[str, Any]:
    """Figures of a run, from its folder if it has finished before."""
    folder = folder_of(output, name, seed)
    result = folder / "claim.json"
    if result.exists():
        finished: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return finished
    place = [f"run.seed={seed}", f"run.output={output}", f"run.name={folder.name}"]
    config = load_config(
        CONFIGS / "sudoku4_rl.yaml", [*place, f"model.path={base_model(output, seed)}", *COMMON, *RUNS[name]]
    )
    started = time.perf_counter()
    summary = train(config)
    figures = {
        "after": [e.summary() for e in summary.after],
        "metrics": RunFolder(folder).metrics(),
        "seconds": time.perf_counter() - started,
    }
    write_json(result, figures)
    return figures


def run_all(
    output: Path, names: Sequence[str], seeds: Sequence[int], processes: int
) -> dict[str, list[dict[str, Any]]]:
    """Name -> figures per seed; two runs at a time."""
    jobs: list[tuple[Any, ...]] = [(run_base, output, seed) for seed in seeds]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")  # torch and fork do not mix
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done in as_completed([pool.submit(*job) for job in jobs]):
            done.result()
        # The longest first, so that the processes finish together.
        ordered = [*(n for n in ("just_grpo", "espo", "policy, experts") if n in names), *names]
        order = dict.fromkeys((name, seed) for name in ordered for seed in seeds)
        waiting = {pool.submit(run_one, output, *job): job for job in order}
        for number, done in enumerate(as_completed(waiting), start=1):
            found[waiting[done]] = done.result()
            name, seed = waiting[done]
            print(f"{number}/{len(waiting)} {name}, seed {seed}: {done.result()['seconds']:.0f} s", flush=True)
    return {name: [found[name, seed] for seed in seeds] for name in names}
