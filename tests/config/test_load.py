"""Configuration files: extends, overrides, messages, round trip."""

from __future__ import annotations

import pytest

from dllm_rl.config.load import dump, load_config

BASE = """
run: {name: demo, steps: 3}
model: {family: tiny, init: {hidden_size: 32}}
data: {task: {name: sudoku4, min_holes: 4}}
algorithm: {name: trace_rl, epsilon: 0.3}
rewards: [{name: sudoku, mode: cells}]
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_reads_sections_plugins_and_their_options(base):
    config = load_config(base)
    assert config.run.steps == 3 and config.learner.lr == 1e-6
    assert config.algorithm.name == "trace_rl" and config.algorithm.options == {"epsilon": 0.3}
    assert config.rewards[0].options == {"mode": "cells"} and config.rewards[0].timeout_s == 5.0


def test_overrides_reach_everywhere_and_parse_like_yaml(base):
    overrides = [
        "learner.lr=2e-6",
        "rewards.0.weight=0.5",
        "data.task.min_holes=7",
        "model.lora.rank=4",
        "run.name=x=y",
    ]
    with pytest.raises(ValueError, match=r"run\.name = 'x=y'"):
        load_config(base, overrides)
    config = load_config(base, overrides[:-1])
    assert config.learner.lr == 2e-6 and config.rewards[0].weight == 0.5
    assert config.data.task.options == {"min_holes": 7} and config.model.lora.rank == 4


def test_another_plugin_drops_the_options_of_the_first(base):
    assert load_config(base, ["algorithm.name=coupled_grpo", "algorithm.pairs=2"]).algorithm.options == {"pairs": 2}
    assert load_config(base, ["algorithm.name=trace_rl"]).algorithm.options == {"epsilon": 0.3}


def test_extends_overlays_key_by_key(base):
    child = base.with_name("child.yaml")
    child.write_text("extends: base.yaml\nrun: {steps: 9}\nalgorithm: {name: masked_sft}\n")
    config = load_config(child)
    assert config.run.steps == 9 and config.run.name == "demo"
    assert config.algorithm.options == {} and config.data.task.options == {"min_holes": 4}


@pytest.mark.parametrize(
    ("parent", "child", "options"),
    [
        ("strategy: {threshold: 0.5}, preset: sdar", "strategy: {name: entropy}", {}),
        ("strategy: {order: x}", "strategy: {name: entropy}", {}),
        ("strategy: {threshold: 0.5}, preset: sdar", "strategy: {name: confidence_threshold}", {"threshold": 0.5}),
        ("strategy: {threshold: 0.5}, preset: sdar", "strategy: {max_tokens_per_step: 2}", {"threshold": 0.5}),
    ],
    ids=["another than the preset's", "another than the default", "the preset's", "no name"],
)
def test_options_without_a_name_belong_to_the_plugin_of_then(base, parent, child, options):
    base.write_text(BASE + f"sampling: {{{parent}}}\n")
    below = base.with_name("child.yaml")
    below.write_text(f"extends: base.yaml\nsampling: {{{child}}}\n")
    found = load_config(below).sampling.strategy
    assert found.options | options == found.options and ("threshold" in options or not found.options)
    if "entropy" in child:
        renamed = load_config(base, ["sampling.strategy.name=entropy"]).sampling.strategy
        assert (renamed.name, renamed.options) == ("entropy", {})


def test_resolved_configuration_is_a_valid_input(base):
    config = load_config(base, ["learner.lr=1e-4"])
    again = base.with_name("again.yaml")
    again.write_text(dump(config.model_copy(update={"provenance": {"git": "abc"}})))
    assert load_config(again).model_copy(update={"provenance": None}) == config


BAD = {
    "unknown key": (["learner.lrr=1"], "unknown key 'learner.lrr'; nearest is 'learner.lr'"),
    "unknown section": (["lerner.lr=1"], "unknown key 'lerner'; nearest is 'learner'"),
    "unknown key without a neighbour": (["run.zzz=1"], "unknown key 'run.zzz'; known: run.name, run.seed"),
    "nested key": (["model.init.hiden_size=8"], "nearest is 'model.init.hidden_size'"),
    "type": (["learner.lr=fast"], "learner.lr = 'fast': input should be a valid number"),
    "range": (["run.steps=0"], "run.steps = 0: input should be greater than or equal to 1"),
    "choice": (
        ["learner.schedule=step"],
        "learner.schedule = 'step': input should be 'constant', 'linear' or 'cosine'",
    ),
    "no equals sign": (["learner.lr"], "override 'learner.lr': expected section.key=value"),
    "into a value": (["run.steps.x=1"], "'run.steps' is a plain value"),
    "list position": (["rewards.5.weight=1"], "'5' is not a position in a list of 1"),
    "two model sources": (["model.path=x"], "exactly one of model.path"),
    "heads": (["model.init.hidden_size=33"], "hidden_size = 33 is not a multiple of num_heads = 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_say_where_and_what(base, name):
    overrides, words = BAD[name]
    with pytest.raises(ValueError) as caught:
        load_config(base, overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: [1", "not valid YAML"),
        ("run: {name: a, name: b}", "the key 'name' is given twice"),
        ("- a\n- b", "holds list"),
        ("extends: base.yaml\nextends2: 1", "unknown key 'extends2'"),
        ("extends: self.yaml", "extends itself"),
        ("extends: nowhere.yaml", "no configuration file"),
        ("", "holds NoneType"),
        ("algorithm: {name: trace_rl}", "missing key 'run'"),
    ],
)
def test_bad_files_say_where_and_what(base, text, words):
    path = base.with_name("self.yaml")
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert words in str(caught.value)


def test_a_missing_file_names_its_neighbour(base):
    with pytest.raises(ValueError, match=r"nearest is .*base\.yaml"):
        load_config(base.with_name("bse.yaml"))
