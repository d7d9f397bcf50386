"""Measurements of likelihood estimators on the shared starts; no training but a short VRPO phase. See claims.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from claim_runs import CONFIGS, base_model
from torch import Tensor

from dllm_rl import seeding
from dllm_rl.config.load import load_config
from dllm_rl.diffusion import likelihood, masking
from dllm_rl.driver.build import Run, build_run
from dllm_rl.driver.collect import demonstrate, roll_out
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Quiet
from dllm_rl.train import train
from dllm_rl.types import MaskSample, RolloutBatch

ROWS, REDRAWS, POOL, BUDGET = 16, 64, 4096, 1 << 16
PAIRS, PAIR_REDRAWS, PAIR_STEPS = 16, 48, 30


def _parts(model: Path, seed: int, *more: str) -> Run:
    overrides = [f"run.seed={seed}", f"model.path={model}", *more]
    return build_run(load_config(CONFIGS / "sudoku4_rl.yaml", overrides), Path(tempfile.mkdtemp()), Quiet())


def _rollouts(output: Path, seed: int) -> tuple[Run, RolloutBatch]:
    """One sampled completion for each of ROWS boards at the quickstart's 4 tokens per forward."""
    shape = [f"data.prompts_per_step={ROWS}", "data.samples_per_prompt=2", "evaluate.limit=1"]
    run = _parts(base_model(output, seed), seed, *shape)
    assert run.reward_pool is not None, "sudoku4 has rewards"
    overrides = [f"run.seed={seed}", f"model.path={base_model(output, seed)}", *shape]
    config = load_config(CONFIGS / "sudoku4_rl.yaml", overrides)
    with run.reward_pool:
        batch = roll_out(run, config, run.source.batch(0), 0, Clock()).batch
    return run, batch.select(torch.arange(0, len(batch), 2))


def _repeated(run: Run, batch: RolloutBatch, draw: Callable[[torch.Generator], MaskSample], times: int) -> Tensor:
    """(times, N) nats; sequence log-likelihoods under independent draws."""
    values = []
    for number in range(times):
        masks = draw(torch.Generator().manual_seed(seeding.derive(0, "claims", number)))
        estimate = likelihood.estimate(
            run.denoiser, batch, masks.also_masking(batch.tail), tokens_per_microbatch=BUDGET
        )
        values.append(estimate.sequence_logp.double())
    return torch.stack(values)


def complementary(output: Path, seed: int) -> dict[str, float]:
    """Mean variance over draws (nats^2) of sequence log-likelihoods from two forwards: a pair, or two draws apart."""
    run, batch = _rollouts(output, seed)
    where = batch.completion

    def apart(one: Callable[[torch.Generator], MaskSample]) -> Callable[[torch.Generator], MaskSample]:
        def draw(generator: torch.Generator) -> MaskSample:
            first, second = one(generator), one(generator)
            return MaskSample(
                mask=torch.cat([first.mask, second.mask]), weight=torch.cat([first.weight, second.weight]) / 2
            )

        return draw

    rates = {"t_min": 0.2, "t_max": 0.8}
    draws: Mapping[str, Callable[[torch.Generator], MaskSample]] = {
        "rates, pair": lambda g: masking.complementary_pair(where, generator=g, **rates),
        "rates, apart": apart(lambda g: masking.bernoulli(where, generator=g, **rates)),
        "counts, pair": lambda g: masking.complementary_count(where, generator=g),
        "counts, apart": apart(lambda g: masking.uniform_count(where, generator=g)),
    }
    return {name: _repeated(run, batch, draw, REDRAWS).var(0).mean().item() for name, draw in draws.items()}


def quadrature(output: Path, seed: int) -> dict[str, float]:
    """Mean squared error (nats^2) against POOL draws: quadrature, and double Monte Carlo, at 2, 3 and 4 forwards."""
    run, batch = _rollouts(output, seed)
    where = batch.completion
    parts = []
    for part in range(POOL // 256):
        generator = torch.Generator().manual_seed(seeding.derive(1, "pool", part))
        masks = masking.uniform_count(where, draws=256, generator=generator).also_masking(batch.tail)
        drawn = likelihood.estimate(run.denoiser, batch, masks, tokens_per_microbatch=BUDGET, draws=True)
        assert drawn.draw_token_logp is not None, "draws=True"
        parts.append(256 * (masks.weight * drawn.draw_token_logp).double().sum(-1))
    pool = torch.cat(parts)  # (POOL, N), each draw an unbiased estimate of its own
    truth = pool.mean(0)
    found = {}
    generator = torch.Generator().manual_seed(0)
    for forwards in (2, 3, 4):
        nodes = _repeated(run, batch, lambda g, n=forwards: masking.quadrature(where, nodes=n, generator=g), REDRAWS)
        found[f"quadrature {forwards}"] = (nodes - truth).square().mean().item()
        found[f"quadrature {forwards}, bias squared"] = (nodes.mean(0) - truth).square().mean().item()
        picks = torch.randint(0, POOL, (POOL, forwards), generator=generator)
        found[f"double Monte Carlo {forwards}"] = (pool[picks].mean(1) - truth).square().mean().item()
        spread = _repeated(
            run, batch, lambda g, n=forwards: masking.uniform_count(where, draws=n, generator=g), REDRAWS
        )
        found[f"stratified {forwards}"] = (spread - truth).square().mean().item()
    return found


def _allocated(where: Tensor, rates: int, masks: int, generator: torch.Generator) -> MaskSample:
    """`rates` independent uniform counts with `masks` masks each, as in VRPO's analysis (no stratification)."""
    length = where.sum(-1, keepdim=True)
    u = torch.rand(rates, len(where), 1, generator=generator, dtype=torch.float64)
    count = (1 + (u * length).floor().long()).clamp(max=length).repeat_interleave(masks, 0)
    order = (
        torch.rand(rates * masks, *where.shape, generator=generator).masked_fill(~where, 2.0).argsort(-1).argsort(-1)
    )
    mask = where & (order < count)
    return MaskSample(mask=mask, weight=(mask * (length / count) / (rates * masks)).float())


def preference_score(output: Path, seed: int) -> dict[str, float]:
    """Mean variance over draws of VRPO's preference score (beta 0.2), after PAIR_STEPS steps of VRPO from the start."""
    name = f"vrpo-seed{seed}"
    shape = ["algorithm={name: vrpo}", "data.prompts_per_step=32", "data.samples_per_prompt=1", "rewards=null"]
    place = [f"run.seed={seed}", f"run.output={output}", f"run.name={name}", f"run.steps={PAIR_STEPS}"]
    still = ["evaluate.at_start=false", "evaluate.at_end=false", "evaluate.every_steps=null"]
    model = output / name / "checkpoints" / f"step-{PAIR_STEPS:06d}" / "model"
    start = base_model(output, seed)
    if not model.exists():
        train(load_config(CONFIGS / "sudoku4_rl.yaml", [f"model.path={start}", *shape, *place, *still]))
    policy, reference = (_parts(path, seed, *shape, *still) for path in (model, start))
    batch = demonstrate(policy, policy.source.batch(10_000)[:PAIRS]).batch
    where, found = batch.completion, {}
    for label, (rates, each, shared) in {
        "(8, 1), shared": (8, 1, True),
        "(4, 1), shared": (4, 1, True),
        "(2, 2), shared": (2, 2, True),
        "(1, 4), shared": (1, 4, True),
        "(4, 1), unshared": (4, 1, False),
    }.items():
        ours = _repeated(policy, batch, lambda g, r=rates, e=each: _allocated(where, r, e, g), PAIR_REDRAWS)
        theirs = _repeated(reference, batch, lambda g, r=rates, e=each: _allocated(where, r, e, g), PAIR_REDRAWS)
        gain = ours - (theirs if shared else theirs.roll(1, 0))  # another redraw's masks
        score = 0.2 * (gain[:, 0::2] - gain[:, 1::2])
        found[label] = score.var(0).mean().item()
    return found
