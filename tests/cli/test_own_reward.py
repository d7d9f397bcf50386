"""A reward file beside the configuration, rows without answers: the first attempt runs."""

from __future__ import annotations

import json

from dllm_rl.cli.main import main

REWARD = """
from words import WANTED

def digits(prompts, completions, **columns):
    return [sum(c in WANTED for c in text) / 16 for text in completions]

def broken(prompts, completions, **columns):
    raise KeyError("color")
"""


def test_an_own_reward_trains_in_the_first_attempt(write, tmp_path, monkeypatch, refuse):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "words.py").write_text("WANTED = '0123'\n")
    (tmp_path / "rows.csv").write_text("prompt\n" + "".join(f"{n}+1=\n" for n in range(8)))
    changes = {
        "data.task": {"name": "rows", "train_file": str(tmp_path / "rows.csv"), "test_fraction": 0.25},
        "model.init.tokenizer": "byte_bpe",
        "model.init.vocab_size": 300,
        "rewards": ["my_reward.py:digits"],
    }
    config = str(write(changes, name="mine/run.yaml"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["train", config, "--quiet"]) == 0
    run = tmp_path / "runs" / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "reward/my_reward.py:digits" in metrics[0] and "eval/4_per_step/success" in metrics[-1]
    assert main(["eval", str(run), "--quiet"]) == 0, "the run knows where its reward is"
    assert main(["train", config, "--resume", "run.steps=3", "--quiet"]) == 0
    refuse(
        ["train", config, "rewards=[my_reward.py:broken]", "run.name=other", "--quiet"],
        ["my_reward.py:broken", "KeyError", "color", "reward_pool.self_test=0"],
    )
    refuse(["train", config, "rewards=[my_reward.py:digit]", "run.name=other"], ["nearest is 'digits'"])
