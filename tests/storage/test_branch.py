"""Going on from an earlier checkpoint: one history at a time, and the other one is kept."""

from __future__ import annotations

import json

import pytest

from dllm_rl.errors import UserError
from dllm_rl.reports.run_folder import comparable, read_rows
from dllm_rl.storage import checkpoint
from tests.one_run import Said, outcome, run

KEEP = {"checkpoint": {"every_steps": 1, "keep": 3}}
OTHER = KEEP | {"learner": {"lr": 3e-2, "schedule": "constant"}}
SAME = KEEP | {"learner": {"lr": 1e-2, "schedule": "constant"}}


def stop_after(steps):
    """``stop`` is asked before the first step, and after each one."""
    asked = iter([False] * steps)
    return lambda: next(asked, True)


def steps(folder):
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_what_came_later_is_set_aside_with_its_record(tmp_path):
    run(tmp_path, sections=SAME)
    folder, first = tmp_path / "run", outcome(tmp_path / "run")
    said = Said()
    run(tmp_path, from_checkpoint="step-000001", sections=OTHER, progress=said)
    assert checkpoint.names(folder / "checkpoints") == ["step-000001", "step-000002", "step-000003"]
    assert steps(folder) == [1, 2, 3] and outcome(folder)[0] != first[0]
    assert checkpoint.names(folder / "aside-1" / "checkpoints") == ["step-000002", "step-000003"]
    assert outcome(folder / "aside-1") == first
    assert any("aside-1" in line and "--resume" in line for line in said.lines), said.lines


def test_a_branch_that_is_stopped_resumes_as_the_branch(tmp_path):
    """Before, the newest checkpoint was the other branch's: its weights, this branch's metrics, exit code 0."""
    run(tmp_path / "whole", sections=SAME)
    run(tmp_path / "whole", from_checkpoint="step-000001", sections=OTHER)
    run(tmp_path / "cut", sections=SAME)
    run(tmp_path / "cut", from_checkpoint="step-000001", sections=OTHER, stop=stop_after(0))
    run(tmp_path / "cut", resume=True, sections=OTHER)
    assert outcome(tmp_path / "cut" / "run") == outcome(tmp_path / "whole" / "run")


def test_the_other_branch_can_be_gone_on_with(tmp_path):
    longer = SAME | {"run": {"steps": 4}}
    run(tmp_path / "whole", sections=longer)
    run(tmp_path, sections=SAME)
    run(tmp_path, from_checkpoint="step-000001", sections=OTHER)
    aside = {"run": {"steps": 4, "output": str(tmp_path / "run"), "name": "aside-1"}}
    run(tmp_path, resume=True, sections=SAME | aside)
    assert comparable(tmp_path / "run" / "aside-1") == comparable(tmp_path / "whole" / "run")


def test_a_run_without_checkpoint_keeps_its_record(tmp_path):
    never = {"checkpoint": {"every_steps": None, "every_minutes": None}}
    with pytest.raises(RuntimeError, match="lost"):
        run(tmp_path, sections=never, stop=raise_after(2))
    assert steps(tmp_path / "run") == [1, 2]
    run(tmp_path, resume=True, sections=never)
    assert steps(tmp_path / "run") == [1, 2, 3]
    assert steps(tmp_path / "run" / "aside-1") == [1, 2]


def raise_after(asked):
    left = iter([False] * asked)

    def stop():
        if next(left, None) is None:
            raise RuntimeError("lost")
        return False

    return stop


def test_a_finished_run_is_left_alone(tmp_path):
    run(tmp_path)
    config = tmp_path / "run" / "config.yaml"
    before, said = config.stat().st_mtime_ns, Said()
    summary = run(tmp_path, resume=True, progress=said)
    assert summary.steps == 3 and config.stat().st_mtime_ns == before
    assert "nothing to do" in said.lines[0]


@pytest.mark.parametrize(("sections", "words"), [({"run": {"steps": 5}}, "run.steps 3 -> 5"), ({}, "nothing to do")])
def test_a_resume_says_that_the_length_moves_a_cosine(tmp_path, sections, words):
    run(tmp_path)
    said = Said()
    run(tmp_path, resume=True, sections=sections, progress=said)
    assert words in " ".join(said.lines)


def test_changed_prompts_are_said(tmp_path):
    run(tmp_path, stop=stop_after(1))
    said = Said()
    task = {"name": "sudoku4", "train_puzzles": 9, "test_puzzles": 2, "min_holes": 4, "max_holes": 6}
    run(tmp_path, resume=True, sections={"data": {"task": task}}, progress=said)
    assert "prompts have changed" in " ".join(said.lines)


def test_an_adapter_on_another_base_is_refused(tmp_path):
    lora = {"model": {"lora": {"rank": 2}}}
    run(tmp_path, sections=lora, stop=stop_after(1))
    weights = tmp_path / "run" / "initial" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="adapter for another model"):
        run(tmp_path, resume=True, sections=lora)


def test_records_shorter_than_the_checkpoint_knows_are_refused(tmp_path):
    run(tmp_path, stop=stop_after(2))
    record = tmp_path / "run" / "metrics.jsonl"
    record.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl' has 12 bytes, and had"):
        run(tmp_path, resume=True)
    record.rename(tmp_path / "elsewhere")
    said = Said()
    run(tmp_path, resume=True, progress=said)
    assert "metrics.jsonl: no longer" in " ".join(said.lines)
