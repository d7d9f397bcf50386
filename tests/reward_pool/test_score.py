from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.score import score_completions
from dllm_rl.types import Prompt


def prompt(uid, answer, **columns) -> Prompt:
    return Prompt(uid=uid, token_ids=(1,), text=f"ask {uid}", answer=answer, task="t", columns=columns)


def test_verifiers_see_answer_length_and_the_tasks_columns(naughty):
    with (naughty / "naughty.py").open("a") as module:
        module.write(
            "def told(prompts, completions, *, answer, completion_tokens, level, **columns):\n"
            "    seen = (prompts[0], completions[0], answer[0], completion_tokens[0], level[0], columns)\n"
            "    return [1.0 if seen == ('ask a', 'x', '4', 7, 3, {'kind': [None]}) else \n"
            "            2.0 if seen == ('ask b', 'y', '5', 8, None, {'kind': ['k']}) else 0.0]\n"
        )
    with RewardPool([RewardPlugin(name="naughty:told")], num_workers=1) as pool:
        rewards = score_completions(pool, [prompt("a", "4", level=3), prompt("b", "5", kind="k")], ["x", "y"], [7, 8])
    assert rewards.total.tolist() == [1.0, 2.0]  # a column that a row lacks is None
