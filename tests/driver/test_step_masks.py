"""The draws of a step's updates: of one stream each, or together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from algorithms.coupled_grpo import CoupledGRPO
from dllm_rl.conformance import cases
from dllm_rl.driver.step_masks import reference_masks, step_masks
from dllm_rl.errors import UserError
from tests.methods import tiny

BATCH = cases.batch(block_causal=False)


class Fresh(CoupledGRPO):
    @property
    def needs(self):
        return dataclasses.replace(super().needs, fresh_masks=True)


class Once(CoupledGRPO):
    @property
    def needs(self):
        return dataclasses.replace(super().needs, fresh_masks=False)


class Together(Fresh):
    def joint_masks(self, batch, generator, updates):
        self.start = torch.rand((), generator=generator).item()
        return [self.masks(batch, generator) for _ in range(updates)]


class Privileged(Fresh):
    def reference_masks(self, batch, masks, generator):
        shown = torch.rand(masks.mask.shape, generator=generator) < 0.5
        return dataclasses.replace(masks, mask=masks.mask & ~shown | (masks.weight != 0))


class OneTooFew(Together):
    def joint_masks(self, batch, generator, updates):
        return super().joint_masks(batch, generator, updates - 1)


def drawn(kind, *, step=0, updates=3):
    config = tiny("coupled_grpo")
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"updates_per_step": updates})})
    algorithm = kind(kind.Config())
    return algorithm, step_masks(algorithm, BATCH, config, step)


def test_masks_of_the_updates_are_drawn_together_from_one_stream():
    (first, masks), (again, same), (other, _) = drawn(Together), drawn(Together), drawn(Together, step=1)
    assert len(masks) == 3 and first.start == again.start != other.start
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(masks, same, strict=True))
    assert not torch.equal(masks[0].mask, masks[1].mask), "one generator goes on from update to update"


def test_algorithms_without_them_keep_a_stream_for_every_update():
    _, three = drawn(Fresh)
    _, two = drawn(Fresh, updates=2)
    assert len(three) == 3 and len(two) == 2
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(two, three, strict=False))
    _, once = drawn(Once)
    assert len(once) == 1 and torch.equal(once[0].weight, three[0].weight)


def test_a_wrong_number_of_them_names_the_algorithm():
    with pytest.raises(UserError, match=r"'coupled_grpo': joint_masks\(\) must return .* each of 3 .* returned 2$"):
        drawn(OneTooFew)


def test_a_reference_has_draws_of_its_own_in_every_update_and_step():
    algorithm, masks = drawn(Privileged)
    config = tiny("coupled_grpo")
    same, again, later = (reference_masks(algorithm, BATCH, masks, config, step) for step in (0, 0, 1))
    assert len(same) == 3 and all(torch.equal(a.mask, b.mask) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same[0].mask, later[0].mask)
    shown = [own.mask & ~seen.mask for own, seen in zip(masks, same, strict=True)]
    assert all(one.any() for one in shown) and not torch.equal(shown[0], shown[1])
    plain, own = drawn(Fresh)
    assert reference_masks(plain, BATCH, own, config, 0) is own
