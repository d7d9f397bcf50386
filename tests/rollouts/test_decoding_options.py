"""Guidance and schedules: the native engine equals the oracle, whatever the batch, and after a pause."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from dllm_rl.types import Sampling
from rollouts.native import NativeSampler
from rollouts.reference import ReferenceSampler

sys.path.insert(0, str(Path(__file__).parent))

from test_engines import MODELS, WEIGHTS, build, prompts_of, same, strategy


@pytest.mark.parametrize("model", ["tiny", "llada"])
def test_guided_rows_equal_the_oracle_and_do_not_depend_on_their_batch(tiny_denoiser, model):
    """Two prompts that differ in what is given only: their canvases pass through the same tokens."""
    denoiser = build(tiny_denoiser, model)
    settings = Sampling(max_new_tokens=9, temperature=0.7, cfg_scale=2.0, steps=3, schedule="uniform", block_size=9)
    prompts = prompts_of(denoiser, injected=((0, 5), (4, 7)), every=2)
    a, b = (NativeSampler(denoiser, strategy("margin"), weights=WEIGHTS), strategy("margin"))
    got = a.generate(prompts, settings, seed=3)
    want = ReferenceSampler(denoiser, b, weights=WEIGHTS).generate(prompts, settings, seed=3)
    for one, other in zip(got, want, strict=True):
        same(one, other)
    for row, prompt in enumerate(prompts):
        same(a.generate([prompt], settings, seed=3)[0], got[row])
    plain = a.generate(prompts, dataclasses.replace(settings, cfg_scale=0.0), seed=3)
    assert any(not torch.equal(x.tokens, y.tokens) for x, y in zip(got, plain, strict=True))


def test_rows_with_equal_tokens_of_which_others_are_given_are_guided_apart(tiny_denoiser):
    """x is given and y decoded in one row, y given and x decoded in the other; without guidance they share forwards."""
    denoiser = build(tiny_denoiser, "tiny")
    settings = Sampling(max_new_tokens=12, temperature=0.0, cfg_scale=2.0)
    engine = NativeSampler(denoiser, strategy("margin"), weights=WEIGHTS)
    base = prompts_of(denoiser)[0]

    def rows(all_given):
        return engine.generate(
            [dataclasses.replace(base, uid=f"{n}", injected=dict([g])) for n, g in enumerate(all_given)],
            settings,
            seed=0,
        )

    def first(t):
        return int(t.events[0, 1]) - t.prompt_length, int(t.events[0, 2])

    given = [(offset, token) for offset in range(12) for token in range(3, denoiser.vocab_size)]
    decoded = [first(t) for t in rows(given)]
    meeting = [(a, b) for a, b, t in zip(given, decoded, rows(decoded), strict=True) if first(t) == a]
    apart = 0
    for pair in meeting:
        alone = [rows([g])[0] for g in pair]
        for got, want in zip(rows(pair), alone, strict=True):
            assert torch.equal(got.tokens, want.tokens) and torch.equal(got.unmask_step, want.unmask_step)
        apart += not torch.equal(alone[0].tokens, alone[1].tokens)
    assert apart, "the test needs rows that meet and go on differently"


@pytest.mark.parametrize("schedule", ["uniform", "timesteps", "ancestral"])
@pytest.mark.parametrize("model", MODELS)
def test_pausing_and_batches_leave_schedules_alone(tiny_denoiser, model, schedule):
    denoiser = build(tiny_denoiser, model)
    settings = Sampling(max_new_tokens=12, temperature=1.0, steps=6, schedule=schedule, block_size=4)
    prompts = prompts_of(denoiser, injected=((1, 5),), every=2)
    name = "random" if schedule == "ancestral" else "entropy"
    engine = NativeSampler(denoiser, strategy(name, temperature=0.3), weights=WEIGHTS)
    whole = engine.generate(prompts, settings, seed=4)
    paused = engine.generate(prompts, settings, seed=4, max_blocks=1)
    assert all(t.finish in ("paused", "eos") for t in paused)
    for got, want in zip(engine.generate(prompts, settings, seed=4, partial=paused), whole, strict=True):
        same(got, want)
    for prompt, want in zip(prompts, whole, strict=True):
        same(engine.generate([prompt], settings, seed=4)[0], want)
