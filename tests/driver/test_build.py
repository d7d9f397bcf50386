"""Held-out decoding: what it takes from the training's settings."""

from __future__ import annotations

import pytest

from dllm_rl.config.load import validate
from dllm_rl.driver.build import _eval_samplings
from dllm_rl.types import Sampling

PLAN = {
    "run": {"name": "demo", "steps": 3},
    "model": {"family": "tiny", "init": {"hidden_size": 32}},
    "data": {"task": {"name": "sudoku4"}},
    "algorithm": {"name": "trace_rl"},
}


@pytest.mark.parametrize(("confidence", "kept"), [("model", (None, None)), ("sampled", (5, 0.9))])
def test_filters_stay_where_they_rank_positions(confidence, kept):
    training = Sampling(max_new_tokens=16, temperature=1.0, top_k=5, top_p=0.9, confidence=confidence)
    (sampling,) = _eval_samplings(validate(PLAN), training)
    assert (sampling.top_k, sampling.top_p) == kept and sampling.temperature == 0 and sampling.confidence == confidence


def test_speeds_replace_steps():
    training = Sampling(max_new_tokens=16, steps=4, schedule="timesteps")
    assert training.tokens_per_step == 4
    assert _eval_samplings(validate(PLAN), training)[0].steps == 4
    asked = _eval_samplings(validate(PLAN | {"evaluate": {"tokens_per_step": [1, 2]}}), training)
    assert [(s.tokens_per_step, s.steps, s.schedule) for s in asked] == [(1, None, "timesteps"), (2, None, "timesteps")]
