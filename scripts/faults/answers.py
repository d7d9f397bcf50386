"""Engines that answer garbage, and wrong input on the command line."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from fault_row import Row

from dllm_rl.cli.main import main
from dllm_rl.config.load import load_config
from dllm_rl.errors import UserError
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable
from dllm_rl.train import train

TITLE = "Answers of engines, and wrong input"
ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("cluster.kind=local", "cluster.engines=1", "algorithm={name: coupled_grpo}", "run.steps=2")
# Each changes `rows`, the right answer to a call; `edit` changes fields of the first row.
GARBAGE = {
    "rows in another order": "rows = rows[::-1]",
    "samples of a prompt swapped": "rows[0], rows[1] = rows[1], rows[0]",
    "another prompt's tokens": "edit(tokens=lambda t: t.roll(1))",
    "NaN log-probabilities": "edit(behaviour_logp=lambda t: t * float('nan'))",
    "log-probabilities above 0": "edit(behaviour_logp=lambda t: -t)",
    "mask tokens left": "edit(tokens=lambda t: torch.cat([t[:-1], torch.ones_like(t[-1:])]))",
    "tokens out of the vocabulary": "edit(tokens=lambda t: torch.cat([t[:-1], t[-1:] + 10**6]))",
    "tokens as floats": "edit(tokens=lambda t: t.float())",
    "a canvas too short": "edit(tokens=lambda t: t[:-1])",
    "an empty completion": "edit(completion_length=lambda n: 0)",
    "one forward more": "edit(num_forwards=lambda n: n + 1)",
    "unmask steps shifted": "edit(unmask_step=lambda t: t.roll(1))",
    "positions committed twice": "edit(events=lambda t: torch.cat([t[:1], t[:-1]]))",
    "events backwards": "edit(events=lambda t: t.flip(0))",
    "rows that pause for ever": "edit(finish=lambda f: 'paused')",
    "weights of another step": "edit(weights=lambda w: dataclasses.replace(w, step=w.step + 1))",
    "tokens said to be of other weights": "edit(weights_step=lambda t: t + (t >= 0))",
}
ENGINE = """
import dataclasses
import torch
from rollouts.native import NativeEngine


class {name}(NativeEngine):
    calls = 0

    def generate(self, prompts, *args, **options):
        rows = super().generate(prompts, *args, **options)
        type(self).calls += 1

        def edit(**changes):
            rows[0] = dataclasses.replace(rows[0], **{{n: f(getattr(rows[0], n)) for n, f in changes.items()}})

        if {when}:
            {body}
        return rows
"""


class _Lines(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def faults(output: Path) -> Iterator[Row]:
    """Every kind of garbage in runs of two steps, then the wrong inputs of the tests."""
    sys.path.insert(0, str(output))
    clean = comparable(_run(output / "clean", "native", _Lines()))
    named = survived = 0
    for number, (kind, body) in enumerate(GARBAGE.items()):
        always, once = f"Always{number}", f"Once{number}"
        text = ENGINE.format(name=always, when="True", body=body)
        text += ENGINE.format(name=once, when="self.calls == 3", body=body)
        (output / f"garbage{number}.py").write_text(text, encoding="utf-8")
        try:
            _run(output / always, f"garbage{number}:{always}", _Lines())
        except UserError as error:
            named += "answers wrongly" in str(error) and not list((output / always).rglob("step-0*"))
        else:
            print(f"not named: {kind}", file=sys.stderr)
        lines = _Lines()
        folder = _run(output / once, f"garbage{number}:{once}", lines)
        survived += comparable(folder) == clean and any("is not what was asked for" in line for line in lines.lines)
    kinds = len(GARBAGE)
    yield Row("an engine that always answers garbage", kinds, named, "one line with prompt, sample and field")
    yield Row("an engine that answers garbage once", kinds, survived, "it is built anew; the run has the same bits")
    yield _wrong_input(output / "input")


def _run(output: Path, engine: str, lines: _Lines) -> Path:
    changes = [f"run.output={output}", f"engine={{name: '{engine}'}}", *LOCAL]
    return train(load_config(ROOT / "configs" / "tiny_sudoku_ray.yaml", changes), progress=lines).folder


def _wrong_input(output: Path) -> Row:
    sys.path.insert(0, str(ROOT / "tests" / "cli"))
    from conftest import SUDOKU
    from test_bad_values import FILES, VALUES

    output.mkdir()
    path, tried, refused = output / "config.yaml", 0, 0
    for changes, spoil in [*((c, None) for c, _ in VALUES.values()), *(({}, s) for s, _ in FILES.values())]:
        values = copy.deepcopy(SUDOKU)
        values["run"]["output"] = str(output / "runs")
        for key, value in changes.items():
            section = values
            *parents, last = key.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        text = yaml.safe_dump(values)
        spoilt = text if spoil is None else spoil(text)
        path.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main(["train", str(path), "--quiet"])
        tried += 1
        refused += code == 2 and said.getvalue().count("\n") == 1 and not (output / "runs" / "run").exists()
    return Row("wrong values and files", tried, refused, "exit code 2, one line, no run folder")
