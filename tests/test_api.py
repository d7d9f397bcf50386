"""dllm-rl from Python: objects as well as names, callbacks, and an import that costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dllm_rl
from dllm_rl.config.load import validate
from dllm_rl.errors import UserError
from dllm_rl.reports.run_folder import comparable

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(4) for b in range(4)]


def sections(folder, name="run", algorithm="diffu_grpo", steps=2):
    init = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 32}
    return {
        "run": {"name": name, "steps": steps, "output": str(folder), "threads": 1},
        "model": {"family": "tiny", "init": init},
        "data": {"prompts_per_step": 4, "samples_per_prompt": 4},
        "sampling": {"max_new_tokens": 4, "tokens_per_step": 2},
        "algorithm": {"name": algorithm},
        "reward_pool": {"workers": 1},
        "evaluate": {"limit": 4, "at_start": False, "at_end": False},
        "diagnostics": {"every_steps": None},
    }


def metrics(summary):
    return [json.loads(line) for line in (summary.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_rows_and_a_function_of_this_file(tmp_path):
    wanted = "0"  # a closure, as in a notebook's cell

    def zeros(prompts, completions, *, answer, **columns):
        assert all(isinstance(one, str) for one in answer)
        return [float(text.count(wanted)) for text in completions]

    given = {"rewards": [zeros, {"name": lambda prompts, completions, **c: [1.0] * len(prompts), "weight": 0.5}]}
    values = sections(tmp_path)
    summary = dllm_rl.train(values, ["learner.lr=0.01"], dataset=ROWS, test_dataset=ROWS[:4], **given)
    assert summary.steps == 2 and "task" not in values["data"]
    row = metrics(summary)[0]
    names = [name for name in row if name.startswith("reward/")]
    assert [name.rpartition(":")[2] for name in names] == ["zeros", "reward"]
    assert row[names[1]] == 1 and 0 <= row[names[0]] <= 4 and row["failed_rows"] == 0
    (evaluation,) = dllm_rl.evaluate(summary.folder)  # the run folder holds all that it needs
    assert evaluation.scored == 4
    (other,) = dllm_rl.evaluate(summary.folder, dataset=ROWS[:2])
    assert other.scored == 2
    text = dllm_rl.generate(summary.folder, "1+1=")[0]
    assert len(text.tokens) == 4


def test_a_function_gives_the_same_bits_as_its_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import light_rewards

    folders = [
        dllm_rl.train(sections(tmp_path, name), ["reward_pool.self_test=0"], dataset=ROWS, rewards=[reward]).folder
        for name, reward in (("object", light_rewards.apart), ("name", "light_rewards:apart"))
    ]
    first, second = map(comparable, folders)
    assert first == second and "reward/light_rewards:apart" in first[0]
    assert not list((folders[0] / "given").glob("*.py"))  # it has a name: nothing to copy


def test_callbacks_see_every_step_and_can_stop_the_run(tmp_path):
    seen = []

    def until_two(step, metrics):
        seen.append((step, "loss" in metrics))
        return step == 2

    config = validate(sections(tmp_path, algorithm="masked_sft", steps=9) | {"data": {"task": task(tmp_path)}})
    summary = dllm_rl.train(config, callbacks=[until_two, lambda step, metrics: None])
    assert summary.steps == 2 and seen == [(1, True), (2, True)]
    assert [p.name for p in (summary.folder / "checkpoints").iterdir()] == ["step-000002"]


def task(folder):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"name": "rows", "train_file": str(file)}


def test_what_cannot_be_given_is_named(tmp_path):
    def train(**given):
        dllm_rl.train(sections(tmp_path), **given)

    cases = [
        ({"rewards": len, "dataset": ROWS}, "give a list of functions"),
        ({"rewards": [3], "dataset": ROWS}, "neither a function, nor a name"),
        ({"rewards": ["sudoku"], "dataset": []}, "holds no rows"),
        ({"rewards": ["sudoku"], "dataset": [3]}, "row 1: is int"),
        ({"rewards": ["sudoku"], "dataset": [{"prompt": {1}}]}, "row 1: .* must be text, numbers or lists"),
        ({"rewards": ["sudoku"], "dataset": [{"answer": "1"}]}, "no column 'prompt'"),
    ]
    for given, words in cases:
        with pytest.raises(UserError, match=words):
            train(**given)


def test_importing_it_costs_nothing_and_train_is_a_function_whoever_imported_the_module():
    code = (
        "import sys, dllm_rl\n"
        "assert {'train', 'generate', 'evaluate', 'load', 'export'} <= set(dir(dllm_rl))\n"
        "print(sorted({'torch', 'pydantic', 'yaml', 'dllm_rl.api'} & set(sys.modules)))\n"
        "from dllm_rl.train import Summary, train\n"
        "import dllm_rl.train as module\n"
        "assert module.train is train and module is sys.modules['dllm_rl.train']\n"
        "try: dllm_rl.train({'run': {}})\n"
        "except ValueError as error: print('missing key' in str(error))\n"
        "print(dllm_rl.generate.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True", "dllm_rl.driver.generate"]
