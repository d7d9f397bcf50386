"""Held-out figures of supervised runs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dllm_rl.config.load import validate
from dllm_rl.models.loading import save_denoiser
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.train import train


def write(path, count):
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1) * (1 + n % 3)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def records(tmp_path, tiny_denoiser):
    """Runs two steps of SFT on 10 rows, 4 more held out, and gives its metrics, samples and vocabulary."""

    def make(name="run", flat=False, test=4, **changes):
        characters = "0123456789+= "
        denoiser = tiny_denoiser(characters=characters)
        if flat:  # logits of 0: every token is equally likely, whatever is masked
            with torch.no_grad():
                for parameter in denoiser.module.parameters():
                    parameter.zero_()
        folder = tmp_path / f"model-{name}"
        folder.mkdir()
        save_denoiser(denoiser, character_tokenizer(characters), folder)
        write(tmp_path / "train.jsonl", 10)
        write(tmp_path / "test.jsonl", test)
        values = {
            "run": {"name": name, "steps": 2, "threads": 1, "output": str(tmp_path / "runs")},
            "model": {"path": str(folder)},
            "data": {
                "task": {
                    "name": "dllm_rl.tasks.rows:Rows",
                    "train_file": str(tmp_path / "train.jsonl"),
                    "test_file": str(tmp_path / "test.jsonl"),
                },
                "prompts_per_step": 2,
            },
            "sampling": {"max_new_tokens": 6, "tokens_per_step": 2},
            "algorithm": {"name": "masked_sft"},
            "evaluate": {"every_steps": 1},
        }
        for key, value in changes.items():
            values[key] = values.get(key, {}) | value
        run = train(validate(values)).folder
        read = [[json.loads(line) for line in (run / f).read_text().splitlines()] for f in FILES]
        return *read, len(character_tokenizer(characters))

    return make


FILES = ("metrics.jsonl", "samples.jsonl")


def losses(metrics):
    return {row["step"]: row["eval/loss"] for row in metrics if "eval/loss" in row}


def test_the_loss_of_a_model_that_knows_nothing_is_the_entropy_of_its_vocabulary(records):
    metrics, _, vocabulary = records(flat=True)
    assert losses(metrics)[0] == pytest.approx(math.log(vocabulary - 1), rel=1e-6)  # the mask token is never predicted


def test_the_draws_are_the_same_at_every_evaluation(records):
    metrics, _, _ = records(learner={"lr": 1e-30})
    found = losses(metrics)
    assert list(found) == [0, 1, 2] and len(set(found.values())) == 1
    again = losses(records("again", learner={"lr": 1e-3})[0])
    assert again[0] == found[0] and again[2] < again[0], "two steps in, it falls"


def test_samples_show_what_held_out_prompts_are_completed_with(records):
    _, samples, _ = records(run={"log_samples": 3})
    first = [row for row in samples if row["step"] == 0]
    assert len(first) == 3 and len(samples) == 9 and {row["prompt"] for row in first} <= {f"{n}+1=" for n in range(4)}
    assert all(row["reference"] == str(int(row["prompt"][0]) + 1) * (1 + int(row["prompt"][0]) % 3) for row in first)
    assert all(isinstance(row["completion"], str) and row["num_forwards"] >= 1 for row in first)


def test_a_row_that_does_not_fit_is_left_out_and_said(records, tmp_path, monkeypatch):
    from dllm_rl.reports.progress import Quiet

    said = []
    monkeypatch.setattr(Quiet, "log", lambda self, text: said.append(text))
    metrics, _, _ = records(sampling={"max_new_tokens": 3}, test=4)
    assert losses(metrics) and not said
    long = {"prompt": "1+1=", "completion": "2222"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n" + json.dumps({"prompt": "2+1=", "completion": "3"}))
    options = {"name": "dllm_rl.tasks.rows:Rows", "train_file": str(tmp_path / "train.jsonl")}
    data = {"task": options | {"test_file": str(tmp_path / "long.jsonl")}}
    assert losses(records("long", sampling={"max_new_tokens": 3}, data=data)[0])
    assert "1 of 2 held-out examples are not in eval/loss; the first: example 'long.jsonl-0'" in said[0]
