"""Parameters of low precision: float32 behind them, or stochastic rounding, against a run in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dllm_rl.config.cluster import LearnerSection
from dllm_rl.conformance.algorithms import Subject, learner_for
from dllm_rl.errors import UserError
from dllm_rl.learner.master_weights import MasterWeights, stochastically_rounded
from dllm_rl.learner.optimizer import Optimizer
from dllm_rl.types import TrainingBatch


def updated(dtype, lr, steps=100, **settings):
    """The change of all weights by SFT updates in a dtype, from the same start; of the masters, if there are any."""
    subject = Subject("masked_sft", {})
    batch, rewards = subject.batch(False), subject.scored()
    learner = learner_for(subject.needs, batch, "tiny", lr=lr, schedule="constant", **settings)
    module = learner.denoiser.module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())  # a start that bfloat16 holds exactly
    module.to(dtype)
    learner._optimizer = learner._make_optimizer(steps)
    weights = learner._optimizer._masters.weights if settings.get("master_weights", "float32") == "float32" else None
    held = list(weights or module.parameters())
    before = torch.cat([w.detach().double().flatten() for w in held])
    for step in range(steps):
        advantage = subject.algorithm.advantages(rewards, batch)
        learner.update(TrainingBatch(batch, rewards, advantage, [subject.masks(batch, step)]), subject.algorithm)
    return torch.cat([w.detach().double().flatten() for w in held]) - before


def likeness(change, wanted):
    """(norm as a share of the wanted one, cosine with it)."""
    return (change.norm() / wanted.norm()).item(), torch.cosine_similarity(change, wanted, dim=0).item()


@pytest.mark.parametrize("lr", [5e-7, 1e-6, 5e-6])
def test_bfloat16_with_masters_is_updated_as_float32(lr):
    wanted = updated(torch.float32, lr)
    norm, cosine = likeness(updated(torch.bfloat16, lr), wanted)
    rounded = likeness(updated(torch.bfloat16, lr, master_weights="stochastic_rounding"), wanted)
    print(f"lr {lr}: masters {norm:.3f} {cosine:.4f}, stochastic rounding {rounded[0]:.3f} {rounded[1]:.4f}")
    assert abs(norm - 1) < 0.05 and cosine > 0.95


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_of_many_micro_batches_add_up(keep):
    """4,096 equal gradients of 0.01: a sum in bfloat16 stands still at 4."""
    weight = nn.Parameter(torch.full((3,), 0.5, dtype=torch.bfloat16))
    masters = MasterWeights([weight], keep=keep)
    for _ in range(4096):
        (0.01 * weight).sum().backward()
    each = torch.tensor(0.01).bfloat16().item()
    torch.testing.assert_close(masters.gradients()[0], torch.full((3,), 4096 * each), rtol=1e-5, atol=0)
    assert weight.grad is None


def test_stochastic_rounding_is_right_on_average_and_keeps_what_fits():
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([1.001, -1.001, 3e-5, 0.0]).repeat(40_000, 1)
    rounded = stochastically_rounded(value, generator)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double().mean(0), value[0].double(), rtol=2e-4, atol=0)
    assert all(len(column.unique()) <= 2 for column in rounded.T)
    whole = torch.randn(1000).bfloat16()
    assert torch.equal(stochastically_rounded(whole.float(), generator), whole)


def small(dtype, **settings):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3).to(dtype)), nn.Parameter(torch.randn(3).to(dtype))]
    parameters.append(nn.Parameter(torch.randn(2, 2)))  # in float32, as a value head or an adapter
    return parameters, Optimizer(parameters, LearnerSection(lr=1e-3, weight_decay=0.1, **settings), 10, seed=3)


def steps(parameters, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        for number in range(2):
            generator = torch.Generator().manual_seed(10 * step + number)
            weighted = [(p.float() * torch.randn(p.shape, generator=generator)).sum() for p in parameters]
            optimizer.backward(torch.stack(weighted).sum(), last=number == 1)
        optimizer.start(step)
        optimizer.step(lambda norm: None)


@pytest.mark.parametrize("master_weights", ["float32", "stochastic_rounding"])
def test_saved_state_goes_on_to_the_same_bits(master_weights, tmp_path):
    whole, optimizer = small(torch.bfloat16, master_weights=master_weights)
    steps(whole, optimizer, 0, 6)
    first, optimizer = small(torch.bfloat16, master_weights=master_weights)
    steps(first, optimizer, 0, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, optimizer = small(torch.bfloat16, master_weights=master_weights)
    with torch.no_grad():
        for parameter, saved in zip(again, first, strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(again, optimizer, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_every_parameter_is_stepped_once_also_beside_float32():
    """Masters, and stochastic rounding in the mean over seeds, do to each parameter what float32 does."""
    wanted, optimizer = small(torch.float32)
    with torch.no_grad():
        for p in wanted:
            p.copy_(p.bfloat16()) if p.shape != (2, 2) else None
    start = [p.detach().clone() for p in wanted]
    steps(wanted, optimizer, 0, 1)
    for master_weights in ("float32", "stochastic_rounding"):
        got, optimizer = small(torch.bfloat16, master_weights=master_weights)
        steps(got, optimizer, 0, 1)
        assert torch.equal(got[2], wanted[2])
        for mine, theirs, first in zip(got[:2], wanted[:2], start[:2], strict=True):
            off = (mine.detach().float() - theirs.detach()).abs()
            assert bool((off <= first.abs() / 128).all()), "within one bfloat16 of the float32 result"


def test_a_state_of_a_version_without_masters_is_refused():
    _, optimizer = small(torch.bfloat16)
    with pytest.raises(UserError, match="without master weights; resume with that version, or"):
        optimizer.load_state_dict(optimizer.state_dict()["adam"])
