"""Options of plugins, checked against the plugin's own Config."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from dllm_rl.config.plugins import build, configure


class Plugin:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        number: float
        count: int = 1
        mode: Literal["board", "cells"] = "board"
        names: tuple[str, ...] = ()
        flag: bool = False
        limit: int | None = None
        anything: Any = None

        def __post_init__(self) -> None:
            if self.count < 1:
                raise ValueError(f"count = {self.count}: must be at least 1")
            if self.flag and self.limit:
                raise ValueError("flag and limit exclude each other")

    def __init__(self, config: Config) -> None:
        self.config = config


class NoConfig:
    pass


def function(prompts, completions, **columns):
    return [1.0]


A_CONSTANT = 3


@pytest.fixture(autouse=True)
def module(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])


def made(**options) -> Plugin.Config:
    return build("rewards", "mine:Plugin", options).config


def test_values_reach_the_config_converted_where_yaml_is_loose():
    config = made(number=2, names=["a", "b"], limit=3)
    assert config.number == 2.0 and isinstance(config.number, float)
    assert config.names == ("a", "b") and config.limit == 3 and config.count == 1
    assert made(number=1.5, limit=None, anything={"x": 1}).anything == {"x": 1}


def test_a_function_is_returned_as_it_is():
    assert build("rewards", "mine:function", {}) is function
    assert configure("rewards", "mine:function", {}) == (function, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mine:Plugin", {"number": 1, "modee": "board"}, "unknown key 'K.modee'; nearest is 'K.mode'"),
        ("mine:Plugin", {"number": 1, "qqqq": 1}, "unknown key 'K.qqqq'; allowed: number, count, mode"),
        ("mine:Plugin", {}, "missing key 'K.number': must be a number"),
        ("mine:Plugin", {"number": "1"}, "K.number = '1': must be a number"),
        ("mine:Plugin", {"number": True}, "K.number = True: must be a number"),
        ("mine:Plugin", {"number": 1, "count": 1.5}, "K.count = 1.5: must be an integer"),
        ("mine:Plugin", {"number": 1, "count": True}, "K.count = True: must be an integer"),
        ("mine:Plugin", {"number": 1, "mode": 3}, "K.mode = 3: must be one of 'board', 'cells'"),
        ("mine:Plugin", {"number": 1, "names": "ab"}, "K.names = 'ab': must be"),
        ("mine:Plugin", {"number": 1, "names": [1]}, r"K.names = \[1\]: must be"),
        ("mine:Plugin", {"number": 1, "flag": 1}, "K.flag = 1: must be true or false"),
        ("mine:Plugin", {"number": 1, "limit": "x"}, "K.limit = 'x': must be an integer or null"),
        ("mine:Plugin", {"number": 1, "count": 0}, "^K.count = 0: must be at least 1"),
        ("mine:Plugin", {"number": 1, "flag": True, "limit": 2}, "^K: flag and limit exclude each other"),
        ("mine:function", {"scale": 2}, "is a plain function and takes no options, got scale"),
        ("mine:NoConfig", {}, "class NoConfig has no nested dataclass Config"),
        ("mine:A_CONSTANT", {}, "neither a class nor a function"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=message.replace("K", f"rewards.{name}")) as caught:
        build("rewards", name, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [
        ("tasks", "sudoku4", "data.task.min_holes"),
        ("algorithms", "coupled_grpo", "algorithm.epsilon"),
        ("strategies", "confidence_threshold", "sampling.strategy.threshold"),
    ],
)
def test_keys_are_those_of_the_configuration_file(kind, name, key):
    with pytest.raises(ValueError, match=f"^{key} = 'x': must be"):
        build(kind, name, {key.split(".")[-1]: "x"})
    with pytest.raises(ValueError, match=f"^{key} = -1"):
        build(kind, name, {key.split(".")[-1]: -1})


def test_importing_it_is_cheap():
    code = "import sys, dllm_rl.config.plugins; print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
