"""Presets of the sampling section: what they set, what overrides them; a written configuration reads the same."""

from __future__ import annotations

import pytest

from dllm_rl.config.load import dump, load_config
from dllm_rl.config.schema import SamplingSection

BASE = """
run: {name: demo, steps: 3}
model: {family: tiny, init: {hidden_size: 32}}
data: {task: {name: sudoku4, min_holes: 4}}
algorithm: {name: trace_rl}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def strategy(section):
    return {"name": section.strategy.name} | section.strategy.options


def test_a_preset_is_resolved_and_read_back(base, tmp_path):
    overrides = ["sampling.preset=dream", "sampling.temperature=1.0", "sampling.top_k=null"]
    config = load_config(base, overrides)
    s = config.sampling
    assert (s.schedule, s.confidence, s.top_p, s.top_p_first) == ("timesteps", "sampled", 0.95, True)
    assert s.temperature == 1.0 and s.top_k is None and strategy(s) == {"name": "entropy"}
    written = tmp_path / "written.yaml"
    written.write_text(dump(config))
    assert load_config(written) == config and "schedule: timesteps" in written.read_text()


def test_options_of_the_presets_own_strategy_are_overlaid_another_strategy_replaces_it(base):
    sdar = {"name": "confidence_threshold", "threshold": 0.85, "at_least_count": True}
    assert strategy(load_config(base, ["sampling.preset=sdar"]).sampling) == sdar
    lower = load_config(base, ["sampling.preset=sdar", "sampling.strategy.threshold=0.5"]).sampling
    assert strategy(lower) == sdar | {"threshold": 0.5}
    other = load_config(base, ["sampling.preset=sdar", "sampling.strategy.name=low_confidence"]).sampling
    assert strategy(other) == {"name": "low_confidence"} and other.confidence == "sampled"


def test_without_a_preset_nothing_changes():
    plain = SamplingSection()
    assert strategy(plain) == {"name": "low_confidence"} and plain.schedule == "static" and plain.temperature == 1.0


def test_unknown_presets_and_two_speeds_are_refused(base):
    with pytest.raises(ValueError, match=r"sampling\.preset = 'lada': .*'llada', 'dream', 'sdar' or 'fast_dllm'"):
        load_config(base, ["sampling.preset=lada"])
    with pytest.raises(ValueError, match="steps = 8 and tokens_per_step = 2 both say"):
        load_config(base, ["sampling.steps=8", "sampling.tokens_per_step=2"])
