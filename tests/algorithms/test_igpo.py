"""IGPO: when hints are given, what replaces what, and which tokens are trained on."""

from __future__ import annotations

import dataclasses
import json

import torch

from dllm_rl.config.schema import Config
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.seeding import generator_for
from dllm_rl.train import train
from dllm_rl.types import Prompt


def igpo(**options):
    return Subject("igpo", {"reserve": 0, "chunk": [1, 2]} | options).algorithm


PROMPTS = [Prompt(uid=u, token_ids=(3,), text="", answer="", task="t", trace=tuple(range(10, 18))) for u in "ab"]


def test_only_groups_without_a_solved_row_get_hints_one_per_sample():
    batch = cases.batch(block_causal=False)
    wanted = igpo().extra_rollouts(
        PROMPTS, cases.rewards([0, 1, 0, 0, 0.5, 0]), batch, canvas=cases.CANVAS, generator=generator_for(0)
    )
    assert [(w.group, w.prompt.uid) for w in wanted] == [(1, "b#hint0"), (1, "b#hint1"), (1, "b#hint2")]
    for prompt in (w.prompt for w in wanted):
        assert prompt.injected and all(prompt.trace[offset] == token for offset, token in prompt.injected.items())
    nothing = igpo().extra_rollouts(
        PROMPTS, cases.rewards([0, 1, 0, 0, 1, 0]), batch, canvas=cases.CANVAS, generator=generator_for(0)
    )
    assert list(nothing) == []


def test_right_hinted_rows_replace_at_most_half_of_their_group():
    """Rows 0-2 and 3-5 are ordinary; then group 1's hinted rows 6-8, of which 6 and 8 are right."""
    batch = cases.batch(block_causal=False).select(torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5]))
    hinted = torch.arange(9) >= 6
    rewards = cases.rewards([1, 0, 0, 0, 0, 0, 1, 0, 1])
    rows = igpo().select_rows(hinted, rewards, batch, generator_for(0)).tolist()
    assert rows[:3] == [0, 1, 2] and rows[3:5] == [4, 5] and rows[5] in (6, 8) and len(rows) == 6
    nothing_right = igpo().select_rows(hinted, cases.rewards([1] + [0] * 8), batch, generator_for(0))
    assert nothing_right.tolist() == [0, 1, 2, 3, 4, 5]


def test_hint_tokens_below_the_entropy_filter_get_a_gradient_through_the_ratio_only():
    subject = Subject("igpo", {"beta": 0.0, "hint_tokens": 0.5})
    plain = subject.experience(subject.batch(False))
    hint = torch.zeros_like(plain.batch.hint)
    hint[0, 3:7] = True  # row 0: 4 of its 8 completion tokens were given
    batch = dataclasses.replace(plain.batch, hint=hint)
    _, gradient = subject.gradient(dataclasses.replace(plain, batch=batch), plain.old)
    _, without = subject.gradient(plain, plain.old)
    # 2 of the 4 hint tokens are trained on: 6 terms instead of 8 carry the row's ratio
    torch.testing.assert_close(gradient[0], without[0] * 6 / 8)
    torch.testing.assert_close(gradient[1:], without[1:])


def test_a_run_on_boards_that_are_never_solved_injects_hints_that_survive(tmp_path):
    """A random model solves nothing; with every cell given, all hinted rows are right and half of each group."""
    config = {
        "run": {"name": "run", "steps": 2, "output": str(tmp_path), "threads": 1, "log_samples": 99},
        "model": {"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 64}},
        "data": {
            "task": {"name": "sudoku4", "train_puzzles": 20, "test_puzzles": 4},
            "prompts_per_step": 3,
            "samples_per_prompt": 4,
        },
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": {"name": "igpo", "reserve": 0, "chunk": [1, 3], "shares": [1.0, 1.0]},
        "evaluate": {"limit": 4, "at_start": False},
    }
    folder = train(Config.model_validate(config)).folder
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in [row for row in metrics if "loss" in row]:
        assert row["all_wrong_groups"] == row["zero_variance_groups"] == 1 and row["hinted_rows"] == 0
        assert row["guided/all_wrong_groups"] == 0 and row["guided/hinted_rows"] == 0.5 and row["grad_norm"] > 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    hinted = [row for row in samples if "#hint" in row["uid"]]
    assert len(hinted) == 12 and all(row["completion"] == row["answer"] and row["reward"] == 1 for row in hinted)
