"""Plugins of other people, held to their contract; what else they are is left as it was."""

from __future__ import annotations

import copy
import pickle
import sys
import time
from typing import Protocol, runtime_checkable

import pytest
import torch
from ray import cloudpickle

from dllm_rl import registry
from dllm_rl.config import contracts
from dllm_rl.config.plugins import build
from dllm_rl.conformance.cases import MIXED, batch, rewards
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Loss


class Mine(Algorithm):
    """Help."""

    flag = 3

    def __init__(self, config):
        super().__init__(config)
        self.calls = []

    @property
    def value_clip(self):
        return self._clip

    @value_clip.setter
    def value_clip(self, value):
        self._clip = value

    @staticmethod
    def keep(rewards, batch):
        return rewards.included

    def advantages(self, rewards, batch):
        self.calls.append("advantages")
        return {
            "rows": rewards.total,
            "tokens": rewards.total[:, None].expand(batch.tokens.shape),
            "draws": rewards.total[:, None].expand(2, *batch.tokens.shape),
            "one more": rewards.total[:, None].expand(2, 2, *batch.tokens.shape),
            "integers": rewards.total.long(),
            "short": rewards.total[1:],
        }[self.way]

    def loss(self, new, experience):
        raise self.error


@pytest.fixture(autouse=True)
def module(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])


@pytest.fixture
def mine() -> Mine:
    return build("algorithms", "mine:Mine", {})


def test_it_stays_what_it_is(mine):
    assert isinstance(mine, Mine) and type(mine).__name__ == "Mine" and type(mine).Config is Algorithm.Config
    assert mine.flag == 3 and mine.needs == Needs() and mine.loss.__name__ == "loss"
    mine.value_clip = 0.5
    assert mine.value_clip == 0.5
    assert mine.keep(rewards(MIXED), batch(block_causal=False)).all()
    with pytest.raises(UserError, match=r"^algorithm 'mine:Mine': masks\(\) raised NotImplementedError"):
        mine.masks(batch(block_causal=False), torch.Generator())


@pytest.mark.parametrize("through", [cloudpickle, pickle], ids=["cloudpickle", "pickle"])
def test_it_travels_to_other_processes(mine, through, monkeypatch):
    monkeypatch.setitem(
        sys.modules, Mine.__module__, sys.modules["mine"]
    )  # pytest imports tests under names of its own
    mine.way = "short"
    for other in (through.loads(through.dumps(mine)), copy.deepcopy(mine)):
        assert type(other) is type(mine) and other.way == "short" and other.calls is not mine.calls
        with pytest.raises(UserError, match=r"^algorithm 'mine:Mine': advantages"):
            other.advantages(rewards(MIXED), batch(block_causal=False))


@pytest.mark.parametrize(
    ("way", "fits"),
    [("rows", 1), ("tokens", 1), ("draws", 1), ("one more", 0), ("integers", 0), ("short", 0)],
)
def test_shapes(mine, way, fits):
    mine.way = way
    if fits:
        assert mine.advantages(rewards(MIXED), batch=batch(block_causal=False)) is not None
        return
    with pytest.raises(UserError, match=r"must return a float tensor .* \(here 6 x 11\), returned \w+ tensor \("):
        mine.advantages(rewards(MIXED), batch=batch(block_causal=False))


@pytest.mark.parametrize("error", [RunStopped("s"), UserError("u"), MemoryError("m"), torch.OutOfMemoryError("o")])
def test_errors_that_are_not_its_own_pass(mine, error):
    mine.error = error
    with pytest.raises(type(error)) as caught:
        mine.loss(None, None)
    assert caught.value is error


def test_what_it_lacks_is_an_attribute_error(monkeypatch):
    """isinstance() asks for the members of optional protocols."""
    monkeypatch.setattr(contracts, "_clauses", lambda base: ["loss", "optional"])
    contracts.guard.cache_clear()
    made = build("algorithms", "mine:Mine", {})
    contracts.guard.cache_clear()
    assert not hasattr(made, "optional") and getattr(made, "optional", 3) == 3


def test_members_of_optional_protocols_are_clauses(monkeypatch):
    @runtime_checkable
    class Optional(Protocol):
        def improved(self) -> None: ...

    Optional.__module__ = Algorithm.__module__
    monkeypatch.setattr(sys.modules[Algorithm.__module__], "Optional", Optional, raising=False)
    monkeypatch.setattr(Mine, "improved", lambda self: [][0], raising=False)
    contracts.guard.cache_clear()
    made = build("algorithms", "mine:Mine", {})
    contracts.guard.cache_clear()
    assert isinstance(made, Optional)
    with pytest.raises(UserError, match=r"'mine:Mine': improved\(\) raised IndexError"):
        made.improved()


def test_the_cause_is_kept(mine):
    mine.error = IndexError("two\nlines")
    words = r"loss\(\) raised IndexError: two lines \(.*test_contracts.py, line \d+\); DLLM_RL_DEBUG=1 shows"
    with pytest.raises(UserError, match=words) as caught:
        mine.loss(None, None)
    assert caught.value.__cause__ is mine.error


def test_ours_are_left_alone():
    assert type(build("algorithms", "trace_rl", {})) is registry.load("algorithms", "trace_rl")


def test_a_check_costs_microseconds(mine):
    mine.way, given, rows = "rows", rewards(MIXED), batch(block_causal=False)
    begin = time.perf_counter()
    for _ in range(1000):
        mine.advantages(given, rows)
    assert (time.perf_counter() - begin) / 1000 < 1e-3  # s; a step takes seconds


def test_a_loss_without_gradient_is_refused(monkeypatch):
    monkeypatch.setattr(Mine, "loss", lambda self, new, experience: Loss(torch.tensor(1.0)))
    with pytest.raises(UserError, match=r"differentiable in new.token_logp, returned Loss of float32 tensor"):
        build("algorithms", "mine:Mine", {}).loss(None, None)
