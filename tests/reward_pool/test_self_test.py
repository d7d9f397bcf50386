"""Training must not start with rewards that do not tell right from wrong."""

import json

import pytest

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.self_test import run_self_test
from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.math_word import GSM8K
from dllm_rl.tasks.rows import Rows
from dllm_rl.tasks.sudoku import Sudoku4


def gsm8k(tmp_path) -> GSM8K:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n}+1?", "answer": f"Count on.\n#### {n + 1}"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return GSM8K(GSM8K.Config(train_file=str(path), test_file=str(path)))


def jsonl(tmp_path, reward="math_answer") -> Rows:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "2+2?", "answer": 4}\n')
    return Rows(Rows.Config(train_file=str(path), success=reward))


def check(task, *rewards: str, timeout_s: float = 5.0) -> None:
    specs = [RewardPlugin(name=name, timeout_s=timeout_s) for name in rewards or task.rewards]
    with RewardPool(specs, num_workers=1) as pool:
        run_self_test(pool, task, task.examples("train")[:8])


def test_every_task_passes_with_its_own_rewards(tmp_path):
    check(Sudoku4(Sudoku4.Config(train_puzzles=8)))
    check(Countdown(Countdown.Config(train_puzzles=8)))
    check(Countdown(Countdown.Config(train_puzzles=8, chat=True)))
    check(gsm8k(tmp_path))
    check(jsonl(tmp_path))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("naughty:always_one", "wrong completion '' of example .* scored 1 .* expected less than 1"),
        ("naughty:always_zero", r"gold completion '\\\\boxed\{4\}' of example .* scored 0 .* expected at least 1"),
        ("naughty:crashes", r"could not be scored: reward .naughty:crashes.: __call__\(\) raised ZeroDivisionError"),
        ("naughty:none", "gave no reward .* for any of 2 completions"),
    ],
)
def test_a_broken_reward_is_refused_in_one_line(naughty, tmp_path, reward, message):
    with (tmp_path / "naughty.py").open("a") as module:
        module.write("def crashes(prompts, completions, **columns): return [1 / 0]\n")
        module.write("def none(prompts, completions, answer, **columns): return [None]\n")
        module.write("always_one.gold = always_zero.gold = True\n")
    with pytest.raises(ValueError, match=f"^reward self-test: .*{message}") as caught:
        check(jsonl(tmp_path, reward))
    assert "\n" not in str(caught.value)


def test_the_reward_that_means_success_must_be_in_the_pool(naughty, tmp_path):
    with pytest.raises(ValueError, match="counts reward 'math_answer' as success, but rewards lists format"):
        check(jsonl(tmp_path), "format")
    check(jsonl(tmp_path, ""), "format")  # nothing is said: the first one


OWN = """
def polite(prompts, completions, **columns): return [float("please" in text) for text in completions]
def exact(prompts, completions, answer, **columns): return [float(c == a) for c, a in zip(completions, answer)]
def close(prompts, completions, answer, **columns): return [0.9 if c == a else 0.1 for c, a in zip(completions, answer)]
close.gold = False
def misspelt(prompts, completions, anser, **columns): return [0.0]
def never(prompts, completions, **columns): return [None]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own_reward.py").write_text(OWN)
    return f"{tmp_path}/own_reward.py:"


def bare(tmp_path, *rows, **options) -> Rows:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Rows(Rows.Config(train_file=str(path), **options))


def test_what_is_checked_follows_from_the_reward(own, tmp_path):
    check(bare(tmp_path, {"prompt": "hi"}), own + "polite")
    check(bare(tmp_path, {"prompt": "hi", "answer": "4"}), own + "polite")
    check(bare(tmp_path, {"prompt": "hi", "completion": "yo"}), own + "polite")
    check(bare(tmp_path, {"prompt": "hi", "answer": "4"}), own + "close")
    check(bare(tmp_path, {"prompt": "hi", "answer": "4"}, gold="{answer}"), own + "exact")
    with pytest.raises(ValueError, match=r"scored 0 .*or data.task.gold, which is '\\\\boxed.*gold = False"):
        check(bare(tmp_path, {"prompt": "hi", "answer": "4"}), own + "exact")


def test_arguments_that_nothing_gives_are_refused_with_the_nearest(own, tmp_path):
    with pytest.raises(ValueError, match="argument 'anser' is no column of the data; nearest is 'answer'"):
        check(bare(tmp_path, {"prompt": "hi", "answer": "4"}), own + "misspelt")


def test_a_reward_that_is_always_none_is_refused(own, tmp_path):
    with pytest.raises(ValueError, match=r"never' gave no reward .* for any of 1 completions"):
        check(bare(tmp_path, {"prompt": "hi"}), own + "never")
