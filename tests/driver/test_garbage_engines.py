"""Runs with engines that answer garbage: named, tried again once, and nothing is learned from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm_rl.errors import UserError
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable
from dllm_rl.train import train

LOCAL = ("cluster.kind=local", "cluster.engines=1", "algorithm={name: coupled_grpo}", "run.steps=2")
ONCE = """
from rollouts.native import NativeEngine

CALLS = []


class Once(NativeEngine):
    '''Answers in another order in its third call.'''

    def generate(self, *args, **options):
        rows = super().generate(*args, **options)
        CALLS.append(None)
        return rows[::-1] if len(CALLS) == 3 else rows


class Apart(NativeEngine):
    '''Right all along, in weights of its own.'''

    def __init__(self, config, setup):
        import dataclasses

        super().__init__(config, dataclasses.replace(setup, shared=None))


class OnceApart(Apart, Once):
    pass
"""


class Lines(Quiet):
    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "once.py").write_text(ONCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "conformance"))
    monkeypatch.delitem(__import__("sys").modules, "once", raising=False)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("TurnsRowsRound", "answers wrongly, also after it was built anew: prompt '.*', sample 0: the row of prompt '"),
        ("MiscountsForwards", "answers wrongly, also after it was built anew: prompt '.*', sample 0: "),
        ("MixesRows", r"says that .* are the learner's \(exact\), and they are .* nats off per token .* it mixes rows"),
        ("Approximate", "says that its log-probabilities are the learner's"),
    ],
)
def test_nothing_is_learned_from_garbage(modules, tiny, engine, words):
    config = tiny(f"engine={{name: 'broken_engines:{engine}'}}", *LOCAL)
    with pytest.raises(UserError, match=f"engine 'broken_engines:{engine}' {words}"):
        train(config)
    assert not list(Path(config.run.output).rglob("checkpoints/step-*"))
    assert not (Path(config.run.output) / config.run.name / "metrics.jsonl").exists()


@pytest.mark.parametrize("once", ["Once", "OnceApart"])
def test_one_wrong_answer_changes_no_bit(modules, tiny, once):
    lines = Lines()
    spoilt = train(tiny(f"engine={{name: 'once:{once}'}}", *LOCAL), progress=lines)
    assert [line for line in lines.lines if "engine 0 is lost: its answer is not what was asked for" in line]
    assert comparable(spoilt.folder) == comparable(train(tiny(*LOCAL)).folder)
