"""Plugins of other people that are wrong: exit code 2, one line that names the plugin and the clause of its contract.

A package with one plugin per fault lies in a folder on the path, and is installed from a wheel with entry points.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from algorithms.trace_rl import TraceRL
from dllm_rl.cli.main import main

# Every method of a contract, of a plugin that is right but for this method.
PLUGINS = """
from dataclasses import dataclass, replace
from algorithms.trace_rl import TraceRL
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.tasks.sudoku import Sudoku4
from rewards.sudoku import Sudoku
from dllm_rl.models.cache import BlockCache
from dllm_rl.weight_transfer.in_process import InProcess
from rollouts.native import NativeEngine
from rollouts.single_turn import SingleTurn
from rollouts.strategies.low_confidence import LowConfidence

METHODS = {
    TraceRL: ("__init__", "check_plan", "advantages", "keep", "masks", "loss"),
    LowConfidence: ("__init__", "bind", "select"),
    NativeEngine: ("__init__", "generate"),
    Sudoku: ("__init__", "__call__"),
    Sudoku4: ("__init__", "examples", "self_test"),
    SingleTurn: ("__init__", "roll_out"),
    InProcess: ("__init__", "unavailable", "send", "receive"),
    BlockCache: ("__init__", "update", "commit"),
}
for base, methods in METHODS.items():
    for method in methods:
        def raises(*args, **kwargs):
            return {}["no such key"]
        def returns(*args, **kwargs):
            return (1, 2, 3)
        for fault in (raises, returns):
            name = f"{base.__name__}_{method}_{fault.__name__}".replace("__", "")
            globals()[name] = type(name, (base,), {method: fault, "__module__": __name__})

class Fine(TraceRL):
    pass

class Apart(NativeEngine):
    def __init__(self, config, setup):
        super().__init__(config, replace(setup, shared=None))

class Half(NativeEngine):
    def generate(self, prompts, sampling, **options):
        return super().generate(prompts, sampling, **options)[::2]

class BadConfig(TraceRL):
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TraceRL.Config):
        def __post_init__(self):
            {}[self.epsilon]

class Particular(TraceRL):
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TraceRL.Config):
        def __post_init__(self):
            raise ValueError("epsilon and beta exclude each other")

class Unnamed(TraceRL):
    @property
    def needs(self):
        return self.no_such_attribute

class NotAnAlgorithm:
    @dataclass
    class Config:
        pass

def function(prompts, completions, **columns):
    return 1 / 0
"""
KEYS = {
    "TraceRL": ("algorithms", "algorithm.name"),
    "LowConfidence": ("strategies", "sampling.strategy.name"),
    "NativeEngine": ("engines", "engine.name"),
    "Sudoku": ("rewards", "rewards"),
    "Sudoku4": ("tasks", "data.task.name"),
    "SingleTurn": ("rollouters", "rollout.rollouter.name"),
    "InProcess": ("transports", "cluster.transport"),
    "BlockCache": ("caches", "engine.cache"),
}
RETURNS = {  # what the contract wants, of methods whose results are looked at
    "advantages": "must return a float tensor (N,), (N, L) or (K, N, L) (here 4 x ",
    "keep": "must return a bool tensor (N,) (here 4 x ",
    "masks": "must return MaskSample of a bool mask and a float weight, both (K, N, L)",
    "loss": "must return Loss of scalar float tensors",
    "select": "must return a bool or int64 tensor (N, W) (here 4 x ",
    "generate": "must return a list of Trajectory, N in all",
    "call": "must return one finite number or None per completion, returned (1, 2, 3)",
    "examples": "must return a sequence of Example",
    "self_test": "must return two texts, (gold, wrong)",
    "roll_out": "must return a list of Turn",
    "receive": "must return a uint8 tensor of the buffer's bytes",
    "update": "must return two tensors (N, H, S + W, head width) (here 4 x ",
}
RAISE = {
    "TraceRL": ("init", "check_plan", "advantages", "keep", "masks", "loss"),
    "LowConfidence": ("init", "bind", "select"),
    "NativeEngine": ("init", "generate"),
    "Sudoku": ("init", "call"),
    "Sudoku4": ("init", "examples", "self_test"),
    "SingleTurn": ("init", "roll_out"),
    "InProcess": ("init", "unavailable", "send", "receive"),
    "BlockCache": ("init", "update", "commit"),
}
FAULTS: list[tuple[str, str, list[str]]] = []  # plugin, key of the configuration, words
for base, methods in RAISE.items():
    for method in methods:
        clause = f"__{method}__()" if method in ("init", "call") else f"{method}()"
        FAULTS.append((f"{base}_{method}_raises", KEYS[base][1], [f"{clause} raised KeyError: 'no such key'"]))
        if method in RETURNS:
            FAULTS.append((f"{base}_{method}_returns", KEYS[base][1], [clause, RETURNS[method], "returned"]))
FAULTS += [
    ("Half", "engine.name", ["generate() must return a list of Trajectory, N in all, returned list of "]),
    ("BadConfig", "algorithm.name", ["Config raised KeyError: 0.2"]),
    ("Unnamed", "algorithm.name", ["needs raised AttributeError", "no_such_attribute"]),
    ("NotAnAlgorithm", "algorithm.name", ["must be a subclass of dllm_rl.protocols.algorithm.Algorithm"]),
    ("NotAnAlgorithm", "cluster.transport", ["must be a subclass of dllm_rl.protocols.transport.Transport"]),
    ("NotAnAlgorithm", "engine.cache", ["must be a class with the methods of dllm_rl.protocols.denoiser.Cache"]),
    ("function", "rewards", ["__call__() raised ZeroDivisionError: division by zero"]),
]
OPTIONS = [
    ("Fine", {"epsilonn": 1.0}, ["unknown key 'algorithm.epsilonn'; nearest is 'algorithm.epsilon'"]),
    ("Fine", {"epsilon": "big"}, ["algorithm.epsilon = 'big': must be a valid number"]),
    ("Particular", {}, ["algorithm: epsilon and beta exclude each other"]),
    ("function", {}, ["algorithm: ", "function' is not a class"]),
]


def package(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    (folder / name / "plugins.py").write_text(PLUGINS)
    (folder / name / "broken.py").write_text("raise OSError('no accelerator\\nhere')\n")
    (folder / name / "lacking.py").write_text("import no_such_package\n")


@pytest.fixture(scope="module")
def on_the_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    package(folder, "theirs_plain")
    return folder


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory):
    """A wheel with an entry point per plugin, installed by pip."""
    source = tmp_path_factory.mktemp("source")
    package(source, "theirs_installed")
    points: dict[str, list[str]] = {}
    kinds = {key: kind for kind, key in KEYS.values()}
    for plugin, key in [*(fault[:2] for fault in FAULTS), ("Fine", "algorithm.name"), ("Apart", "engine.name")]:
        points.setdefault(kinds[key], []).append(f"their_{plugin} = theirs_installed.plugins:{plugin}")
    points["algorithms"] += ["their_broken = theirs_installed.broken:X", "their_lacking = theirs_installed.lacking:X"]
    about = "theirs_installed-1.0.dist-info"
    (source / about).mkdir()
    (source / about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs-installed\nVersion: 1.0\n")
    (source / about / "WHEEL").write_text(
        "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    (source / about / "entry_points.txt").write_text(
        "".join("\n".join([f"[dllm_rl.{group}]", *lines, ""]) for group, lines in points.items())
    )
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    record = [f"{path.relative_to(source)},,\n" for path in files] + [f"{about}/RECORD,,\n"]
    (source / about / "RECORD").write_text("".join(record))
    wheel = source / "theirs_installed-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in [*files, source / about / "RECORD"]:
            archive.write(path, path.relative_to(source))
    target = tmp_path_factory.mktemp("venv") / "lib" / "site-packages"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    return target


@pytest.fixture(params=["folder", "wheel"])
def named(request, monkeypatch):
    """Puts the package on the path; the name of a plugin in a configuration."""
    place = request.getfixturevalue("on_the_path" if request.param == "folder" else "site_packages")
    monkeypatch.syspath_prepend(str(place))
    return lambda plugin, module="plugins": (
        f"theirs_plain.{module}:{plugin}" if request.param == "folder" else f"their_{plugin}"
    )


def small(key: str, name: str, **options: Any) -> dict[str, Any]:
    """One step without evaluation, with one part replaced."""
    changes: dict[str, Any] = {
        "run.steps": 1,
        "evaluate": {"at_start": False, "at_end": False},
        "reward_pool": {"workers": 1, "self_test": 1},
        "rewards": [{"name": "sudoku"}],
    }
    if key == "rewards":
        return changes | {"rewards": [{"name": "sudoku", "weight": 0.0}, {"name": name, **options}]}
    if key == "cluster.transport":  # for an engine that keeps weights of its own
        changes["engine.name"] = "their_Apart" if name.startswith("their_") else "theirs_plain.plugins:Apart"
    if key == "engine.cache":
        changes |= {"model.family": "sdar", "model.block_size": 4}
    changes[key] = name
    return changes | {f"{key.rpartition('.')[0]}.{option}": value for option, value in options.items()}


@pytest.mark.parametrize(("plugin", "key", "words"), FAULTS, ids=[f"{fault[0]}-{fault[1]}" for fault in FAULTS])
def test_the_plugin_and_the_clause_are_named(named, write, refuse, plugin, key, words):
    config = write(small(key, named(plugin)))
    refuse(
        ["train", str(config), "--quiet"],
        [f"'{named(plugin)}': ", *words] if "must be a " not in words[0] else words,
        begun=True,  # some are wrong from the first step on, others are refused beforehand
    )


@pytest.mark.parametrize(("plugin", "options", "words"), OPTIONS)
def test_options_are_named_as_in_the_configuration(on_the_path, monkeypatch, write, refuse, plugin, options, words):
    monkeypatch.syspath_prepend(str(on_the_path))
    config = write(small("algorithm.name", f"theirs_plain.plugins:{plugin}", **options))
    refuse(["train", str(config), "--quiet"], words)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("broken", ["importing 'theirs_", "raised OSError: no accelerator here"]),
        ("lacking", ["importing 'theirs_", "raised ModuleNotFoundError: No module named 'no_such_package'"]),
    ],
)
def test_a_module_that_cannot_be_imported(named, write, refuse, module, words):
    name = named("X", module) if ":" in named("X") else f"their_{module}"
    refuse(["train", str(write(small("algorithm.name", name))), "--quiet"], [f"{module}:X': ", *words])


def test_rewards_that_fail_in_training(on_the_path, monkeypatch, write, refuse):
    monkeypatch.syspath_prepend(str(on_the_path))
    changes = small("rewards", "theirs_plain.plugins:function") | {"reward_pool": {"workers": 1, "self_test": 0}}
    words = ["step 0: 100%", "max_failure_fraction", "reward 'theirs_plain.plugins:function': __call__() raised Zero"]
    refuse(["train", str(write(changes)), "--quiet"], words, begun=True)


@pytest.mark.parametrize(("place", "debug"), [("on_the_path", ""), ("site_packages", "1")])
def test_in_a_process_of_its_own(place, debug, request, write):
    plugin = "theirs_plain.plugins:TraceRL_loss_raises" if place == "on_the_path" else "their_TraceRL_loss_raises"
    config = write(small("algorithm.name", plugin))
    env = {**os.environ, "PYTHONPATH": str(request.getfixturevalue(place)), "DLLM_RL_DEBUG": debug}
    command = [sys.executable, "-W", "ignore", "-m", "dllm_rl", "train", str(config), "--quiet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[-1].startswith(f"error: algorithm '{plugin}': loss() raised KeyError"), lines
    assert (len(lines) > 1) == bool(debug) == ('return {}["no such key"]' in done.stderr), (
        "it shows where it was raised"
    )


def test_a_plugin_that_is_right_trains_as_ours_does(named, write, tmp_path):
    losses = []
    for number, name in enumerate(["trace_rl", named("Fine")]):
        config = write(small("algorithm.name", name), output=tmp_path / str(number))
        assert main(["train", str(config), "--quiet"]) == 0
        lines = (tmp_path / str(number) / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert losses[0] == losses[1] != [None]


@pytest.mark.parametrize("place", ["algorithms.trace_rl:TraceRL.loss", "dllm_rl.train:one_step"])
def test_an_error_of_our_own_keeps_its_traceback(place, write, monkeypatch, capsys):
    def wrong(*args, **kwargs):
        return [][0]

    monkeypatch.setattr(place.replace(":", "."), wrong)
    assert main(["train", str(write(small("algorithm.name", "trace_rl"))), "--quiet"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "return [][0]" in shown and shown.splitlines()[-1].startswith("IndexError")


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (MemoryError("m"), 1), (torch.OutOfMemoryError("m"), 1)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_the_plugins_passes(error, code, write, monkeypatch, capsys):
    def loss(self, new, experience):
        raise error

    monkeypatch.setitem(sys.modules, "theirs_here", type(sys)("theirs_here"))
    sys.modules["theirs_here"].Mine = type("Mine", (TraceRL,), {"loss": loss, "__module__": "theirs_here"})
    assert main(["train", str(write(small("algorithm.name", "theirs_here:Mine"))), "--quiet"]) == code
    shown = capsys.readouterr().err
    assert "theirs_here:Mine" not in shown and (code == 130 or "out of memory in phase 'update'" in shown)
