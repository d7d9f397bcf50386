"""Twelve updates on one batch: with one mask they learn the mask, with new ones what the mask is a sample of."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import learner_for
from dllm_rl.diffusion.advantage import per_token
from dllm_rl.seeding import generator_for
from dllm_rl.types import TrainingBatch

UPDATES, INDEPENDENT = 12, 48


def gains(name: str, fresh: bool) -> tuple[float, float]:
    """Advantage-weighted gains in log-likelihood by twelve updates: under the masks they saw, and under others."""
    algorithm = build("algorithms", name, {"fresh_masks": fresh, "beta": 0.0, "epsilon": 10.0})
    batch, scored = cases.batch(block_causal=False), cases.rewards(cases.MIXED)
    settings = {"updates_per_step": UPDATES, "lr": 3e-4, "schedule": "constant"}
    learner = learner_for(algorithm.needs, batch, "tiny", **settings)
    weight = per_token(algorithm.advantages(scored, batch))

    def drawn(what: str, number: int):
        return [algorithm.masks(batch, generator_for(0, what, one)) for one in range(number)]

    seen = drawn("trained", UPDATES if algorithm.needs.fresh_masks else 1)
    other = drawn("other", INDEPENDENT)

    def value(masks) -> float:
        return torch.stack([(weight * learner.score(batch, one).token_logp).sum() for one in masks]).mean().item()

    before = value(seen), value(other)
    learner.update(TrainingBatch(batch, scored, algorithm.advantages(scored, batch), seen), algorithm)
    return value(seen) - before[0], value(other) - before[1]


@pytest.mark.parametrize("name", ["coupled_grpo", "espo", "gdpo"])
def test_new_masks_at_every_update_generalise_to_others(name):
    trained, other = gains(name, fresh=True)
    alone, elsewhere = gains(name, fresh=False)
    print(f"{name}: fresh {other / trained:.2f} of {trained:.3f}, one mask {elsewhere / alone:.2f} of {alone:.3f}")
    assert other >= 0.8 * trained > 0
    assert elsewhere / alone < other / trained, "one mask is learned, and not what it is a sample of"
