import pytest
import torch

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.protocols.rollouter import Turn
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.score import failure_summary, score_completions, score_turns
from dllm_rl.types import GIVEN, Prompt, Trajectory, WeightsVersion


def prompt(uid, answer, **columns) -> Prompt:
    return Prompt(uid=uid, token_ids=(1,), text=f"ask {uid}", answer=answer, task="t", columns=columns)


def test_verifiers_see_answer_length_and_the_tasks_columns(naughty):
    with (naughty / "naughty.py").open("a") as module:
        module.write(
            "def told(prompts, completions, *, answer, completion_tokens, level, **columns):\n"
            "    own = {'kind': columns['kind']}\n"
            "    seen = (prompts[0], completions[0], answer[0], completion_tokens[0], level[0], own)\n"
            "    return [1.0 if seen == ('ask a', 'x', '4', 7, 3, {'kind': [None]}) else \n"
            "            2.0 if seen == ('ask b', 'y', '5', 8, None, {'kind': ['k']}) else 0.0]\n"
        )
    with RewardPool([RewardPlugin(name="naughty:told")], num_workers=1) as pool:
        rewards = score_completions(pool, [prompt("a", "4", level=3), prompt("b", "5", kind="k")], ["x", "y"], [7, 8])
    assert rewards.total.tolist() == [1.0, 2.0]  # a column that a row lacks is None


def test_a_step_says_once_why_rows_failed(naughty):
    with RewardPool([RewardPlugin(name="naughty:as_told")], num_workers=1) as pool:
        rewards = pool.score(["p"] * 20, ["fine"] * 19 + ["raise out of luck"], {})
        first, second = (failure_summary(pool, rewards, limit=0.5) for _ in range(2))
        few = pool.score(["p"] * 21, ["fine"] * 20 + ["raise out of luck"], {})
        assert not failure_summary(pool, few, limit=0.5).startswith("warning")
        assert failure_summary(pool, pool.score(["p"], ["fine"], {}), limit=0.5) == ""
    start = "warning: 1 of 20 completions could not be scored (0 timed out), the run stops above"
    assert first.startswith(start) and second.startswith(start)
    assert "RuntimeError: out of luck" in first and "naughty.py:" in first and "luck" not in second


def ended(finish) -> Turn:
    step = torch.tensor([GIVEN, 0, 1])
    trajectory = Trajectory(
        prompt_uid="a",
        sample=0,
        tokens=torch.tensor([1, 5, 6]),
        prompt_length=1,
        completion_length=2,
        events=torch.empty(0, 3, dtype=torch.int64),
        unmask_step=step,
        behaviour_logp=torch.zeros(3),
        num_forwards=2,
        finish=finish,
        exact=True,
        weights=WeightsVersion(step=0, digest=""),
        weights_step=step,
    )
    return Turn(trajectory=trajectory, prompt=prompt("a", "4", level=3), group=0, episode=0 if finish == "eos" else 1)


@pytest.mark.parametrize(("blank", "want"), [(False, [1.0, 1.0]), (True, [1.0, 0.0])])
def test_a_right_answer_in_a_completion_that_never_ended_counts_or_not(naughty, blank, want):
    with (naughty / "naughty.py").open("a") as module:
        module.write("def right(prompts, completions, **columns):\n    return [float('4' in c) for c in completions]\n")
    with RewardPool([RewardPlugin(name="naughty:right")], num_workers=1, blank_truncated=blank) as pool:
        rewards = score_turns(pool, [ended("eos"), ended("length")], ["is 4", "4 or 5 or"], "episode")
    assert rewards.total.tolist() == want
