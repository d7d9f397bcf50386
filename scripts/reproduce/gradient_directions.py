"""Why random-mask likelihoods do little for parallel decoding: where each estimator's policy gradient points.

    python scripts/reproduce/gradient_directions.py --model runs/.../model --batches 64

For the same rollouts (temperature 1, 4 tokens per forward) and the same advantages, the gradient of mean_i A log p_i is
averaged over many batches per estimator. Printed for each: the cosine of one batch's gradient with the average of the
others (noise), the cosine between the averages (direction), and the share of the squared gradient with respect to the
logits that falls on tokens of failed boards that are right (misplaced blame).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl import seeding
from dllm_rl.config.load import load_config
from dllm_rl.config.plugins import build
from dllm_rl.diffusion import advantage, likelihood
from dllm_rl.driver.build import Run, build_run
from dllm_rl.driver.collect import roll_out
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Quiet
from dllm_rl.types import MaskSample, RolloutBatch

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "sudoku4_rl.yaml"
ESTIMATORS = {
    "trajectory (trace_rl)": ("trace_rl", {}),
    "1 pair (coupled_grpo)": ("coupled_grpo", {}),
    "4 pairs (coupled_grpo)": ("coupled_grpo", {"pairs": 4}),
    "fully masked (diffu_grpo)": ("diffu_grpo", {}),
}


def gradient(run: Run, batch: RolloutBatch, masks: MaskSample, weight: Tensor) -> Tensor:
    """Flat float64 gradient of sum_n weight_n sum_i log p(token_i of row n) over the trained parameters."""
    module = run.denoiser.module
    module.zero_grad(set_to_none=True)
    needed = MaskSample(mask=masks.mask, weight=masks.weight * (weight != 0)[None, :, None])
    for work in likelihood.plan(batch, needed, 1 << 16):
        logp, pair, position = likelihood.score(run.denoiser, batch, needed, work)
        (likelihood.weights(needed, work, pair, position) * logp * weight[work.row[pair]]).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in module.parameters() if p.grad is not None])


def misplaced(run: Run, batch: RolloutBatch, masks: MaskSample, weight: Tensor, right: Tensor) -> tuple[float, float]:
    """(on right tokens of failed rows, all): squared norms of the gradient with respect to the chosen tokens' logits.

    d/dlogits of log p(token) is onehot - p; its largest entry is 1 - p(token), which stands for its length here.
    """
    blamed = total = 0.0
    with torch.no_grad():
        for work in likelihood.plan(batch, masks, 1 << 16):
            logp, pair, position = likelihood.score(run.denoiser, batch, masks, work)
            row, scale = work.row[pair], likelihood.weights(masks, work, pair, position)
            size = (weight[row] * scale * (1 - logp.exp())).square().double()
            blamed += float(size[(weight[row] < 0) & right[row, position]].sum())
            total += float(size.sum())
    return blamed, total


def measure(run: Run, config: Any, batches: int) -> dict[str, Any]:
    """Everything that is printed."""
    algorithms = {name: build("algorithms", plugin, options) for name, (plugin, options) in ESTIMATORS.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    blame = {name: [0.0, 0.0] for name in ESTIMATORS}
    for step in range(batches):
        prompts = run.source.batch(step)
        collected = roll_out(run, config, prompts, step, Clock())
        batch, rewards = collected.batch, collected.rewards
        a = advantage.group_mean(rewards.total, batch.group, rewards.included) / len(batch)
        answers = torch.tensor([run.tokenizer(p.answer, add_special_tokens=False)["input_ids"] for p in prompts])
        right = batch.tokens.clone().fill_(-1)
        right[:, int(batch.prompt_length[0]) :] = answers[batch.group]
        for name, algorithm in algorithms.items():
            masks = algorithm.masks(batch, seeding.generator_for(config.run.seed, "masks", name, step))
            gradients[name].append(gradient(run, batch, masks, a))
            for i, value in enumerate(misplaced(run, batch, masks, a, right == batch.tokens)):
                blame[name][i] += value
    mean = {name: torch.stack(g).mean(0) for name, g in gradients.items()}
    result: dict[str, Any] = {"rows": batches * len(batch)}
    for name, all_of_it in gradients.items():
        rest = [(batches * mean[name] - g) / (batches - 1) for g in all_of_it]
        cosines = [torch.cosine_similarity(g, r, dim=0).item() for g, r in zip(all_of_it, rest, strict=True)]
        result[name] = {
            "cosine of one batch with the others": sum(cosines) / batches,
            "cosine with the trajectory average": torch.cosine_similarity(
                mean[name], mean[next(iter(mean))], dim=0
            ).item(),
            "blame on right tokens": blame[name][0] / blame[name][1],
        }
    return result


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the start: .../checkpoints/step-000300/model")
    parser.add_argument("--batches", type=int, default=64, help="of 32 x 8 rows")
    arguments = parser.parse_args()
    config = load_config(CONFIG, [f"model.path={arguments.model}", "run.name=gradients"])
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(config, Path(folder), Quiet())
        assert run.reward_pool is not None
        with run.reward_pool:
            print(json.dumps(measure(run, config, arguments.batches), indent=1))


if __name__ == "__main__":
    main()
