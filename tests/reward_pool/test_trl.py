"""TRL's own reward functions run as they are, and functions in its form get what TRL hands them."""

import importlib
import importlib.util

import pytest

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool.pool import RewardPool

OURS = """
import asyncio

def best_of_group(completions, **kwargs):
    longest = max(len(text) for text in completions)
    return [float(len(text) == longest) for text in completions]

def handed(prompts, completions, completion_ids, trainer_state, **kwargs):
    chat = prompts[0] == [{"role": "user", "content": "q"}] and completions[0][0]["role"] == "assistant"
    return [float(chat and ids == [7, 8] and trainer_state.global_step == 3) for ids in completion_ids]

async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.25] * len(completions)

def own_names(questions, texts, **columns):
    return [float(text == "b") for text in texts]

def one_hangs(completions, **kwargs):
    while "hang" in completions:
        pass
    return [float(len(completions))] * len(completions)

def one_raises(completions, **kwargs):
    return [1 / (text != "raise") for text in completions]

def too_few(completions, **kwargs):
    return [1.0]
"""
THEIRS = """
from trl.rewards import (accuracy_reward, get_repetition_penalty_reward, get_soft_overlong_punishment,
                         get_cosine_scaled_reward, reasoning_accuracy_reward, think_format_reward)
overlong = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
repetition = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
cosine = get_cosine_scaled_reward(max_len=4)
"""
CHAT = [{"role": "user", "content": "q"}]


@pytest.fixture
def score(tmp_path, monkeypatch):
    """score("mine:function", texts, ...) -> (values of the function, rewards)."""
    (tmp_path / "mine.py").write_text(OURS)
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "theirs"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)

    def run(name, texts, *, columns=None, timeout_s=20.0, chat=True, ids=None, groups=None):
        n = len(texts)
        with RewardPool([RewardPlugin(name=name, timeout_s=timeout_s)], num_workers=1) as pool:
            pool.begin_step(3)
            rewards = pool.score(
                ["q"] * n,
                texts,
                columns or {},
                groups=groups or [0] * n,
                messages=[CHAT if chat else None] * n,
                completion_ids=ids or [[7, 8]] * n,
            )
        return rewards.components[name].tolist(), rewards

    return run


def test_a_group_is_scored_together(score):
    groups = [0, 1, 0, 1, 0]
    values, _ = score("mine:best_of_group", ["a", "bb", "ccc", "d", "ee"], groups=groups, chat=False)
    assert values == [0.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "values"), [("handed", [1.0, 1.0]), ("later", [0.25, 0.25]), ("own_names", [0.0, 1.0])]
)
def test_a_function_is_handed_what_trl_hands_it(score, name, values):
    assert score(f"mine:{name}", ["a", "b"])[0] == values


def test_a_row_that_hangs_is_found_and_the_others_are_scored(score):
    values, rewards = score("mine:one_hangs", ["a", "b", "hang", "d"], timeout_s=0.3, chat=False)
    assert rewards.status == ("ok", "ok", "timeout", "ok")
    assert [values[row] for row in (0, 1, 3)] == [2.0, 2.0, 1.0]  # scored with the half that does not hang


def test_a_row_that_raises_is_found_and_its_line_is_named(score, tmp_path):
    _, rewards = score("mine:one_raises", ["a", "b", "raise"], chat=False)
    assert rewards.status == ("ok", "ok", "error")
    line = 1 + OURS.splitlines().index('    return [1 / (text != "raise") for text in completions]')
    assert f"ZeroDivisionError: division by zero ({tmp_path}/mine.py:{line})" in rewards.reasons[2]


def test_too_few_values_fail_the_whole_group(score):
    _, rewards = score("mine:too_few", ["a", "b"], chat=False)
    assert rewards.status == ("error", "error") and "returned [1.0] for 2" in rewards.reasons[0]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
@pytest.mark.parametrize(
    ("name", "texts", "columns"),
    [
        ("accuracy_reward", [r"\boxed{\frac12}", r"\boxed{3}"], {"solution": [r"\frac{1}{2}"] * 2}),
        (
            "reasoning_accuracy_reward",
            [r"x</think> \boxed{\frac12}", r"x</think> \boxed{3}"],
            {"solution": [r"\frac{1}{2}"] * 2},
        ),
        ("think_format_reward", ["<think>a</think>b", "b"], {}),
        ("overlong", ["a", "b"], {}),
        ("repetition", ["a", "b"], {}),
        ("cosine", [r"\boxed{2}", r"\boxed{2}"], {"solution": ["2", "3"]}),
    ],
)
def test_the_functions_of_trl_run_unchanged(score, name, texts, columns):
    """As called by hand with what TRL's trainer hands them."""
    ids = [[1, 2], [1, 1, 1]]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    theirs = getattr(importlib.import_module("theirs"), name)
    direct = theirs(prompts=[CHAT] * 2, completions=completions, completion_ids=ids, **columns)
    found, rewards = score(f"theirs:{name}", texts, columns=columns, ids=ids)
    assert found == pytest.approx(direct), rewards.reasons
    assert None not in found
