"""Options of plugins, checked against the plugin's own Config."""

import subprocess
import sys
from dataclasses import dataclass
from datetime import date
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
        pair: tuple[float, float] = (0.0, 1.0)
        level: Literal[1, 2] = 1
        either: int | str = 0
        day: date | None = None
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
    assert made(number=1.5, limit=None, anything={1: (2,)}).anything == {1: (2,)}
    assert made(number=1, pair=[1, 2]).pair == (1.0, 2.0)
    assert made(number=1, day=date(2026, 1, 2)).day == made(number=1, day="2026-01-02").day == date(2026, 1, 2)


def test_a_function_is_returned_as_it_is():
    assert build("rewards", "mine:function", {}) is function
    assert configure("rewards", "mine:function", {}) == (function, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mine:Plugin", {"number": 1, "modee": "board"}, "unknown key 'K.modee'; nearest is 'K.mode'"),
        ("mine:Plugin", {"number": 1, "qqqq": 1}, "unknown key 'K.qqqq'; known: K.number, K.count, K.mode"),
        ("mine:Plugin", {}, "missing key 'K.number'"),
        ("mine:Plugin", {"number": "1"}, "K.number = '1': must be a valid number"),
        ("mine:Plugin", {"number": True}, "K.number = True: must be a valid number"),
        ("mine:Plugin", {"number": 1, "count": 1.5}, "K.count = 1.5: must be a valid integer"),
        ("mine:Plugin", {"number": 1, "count": True}, "K.count = True: must be a valid integer"),
        ("mine:Plugin", {"number": 1, "mode": 3}, "K.mode = 3: must be 'board' or 'cells'"),
        ("mine:Plugin", {"number": 1, "names": "ab"}, "K.names = 'ab': must be a valid array"),
        ("mine:Plugin", {"number": 1, "pair": [1, 2, 3]}, "K.pair = .*: tuple should have at most 2 items"),
        ("mine:Plugin", {"number": 1, "level": True}, "K.level = True: must be 1, not true or false"),
        ("mine:Plugin", {"number": 1, "either": [1]}, r"K.either = \[1\]: must be a valid integer or a valid string"),
        ("mine:Plugin", {"number": 1, "mode": date(2026, 1, 2)}, "K.mode = .*: must be 'board' or 'cells'"),
        ("mine:Plugin", {"number": 1, "names": [1]}, r"K.names.0 = 1: must be a valid string"),
        ("mine:Plugin", {"number": 1, "flag": 1}, "K.flag = 1: must be a valid boolean"),
        ("mine:Plugin", {"number": 1, "limit": "x"}, "K.limit = 'x': must be a valid integer or null"),
        ("mine:Plugin", {"number": 1, "count": 0}, "^K.count = 0: must be at least 1"),
        ("mine:Plugin", {"number": 1, "flag": True, "limit": 2}, "^K: flag and limit exclude each other"),
        ("mine:function", {"scale": 2}, "is a plain function and takes no options, got scale"),
        ("mine:NoConfig", {}, "class NoConfig has no nested dataclass Config"),
        ("mine:A_CONSTANT", {}, "is not a class or a function"),
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
