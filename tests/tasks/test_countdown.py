"""Countdown problems; the solution is computed by Python itself, the only place where eval is safe: our own output."""

from fractions import Fraction

import pytest

from dllm_rl.tasks.countdown import Countdown


def task(**options) -> Countdown:
    return Countdown(Countdown.Config(**{"train_puzzles": 300, "test_puzzles": 100} | options))


@pytest.mark.parametrize("count", [3, 4, 6])
def test_the_reference_uses_each_number_once_and_hits_the_target(count):
    for example in task(min_numbers=count, max_numbers=count).examples("train"):
        numbers, target = example.columns["numbers"], example.columns["target"]
        spelled = "".join(c if c.isdigit() else " " for c in example.completion).split()
        assert sorted(map(int, spelled)) == sorted(numbers) and len(numbers) == count
        exact = "".join(f"Fraction({token})" if token.isdigit() else token for token in tokens(example.completion))
        assert eval(exact, {"Fraction": Fraction}) == target == int(example.answer)
        assert 1 < target <= 999


def tokens(expression: str) -> list[str]:
    for operator in "+-*/()":
        expression = expression.replace(operator, f" {operator} ")
    return expression.split()


def test_no_set_of_numbers_is_in_both_splits():
    sets = [{tuple(sorted(e.columns["numbers"])) for e in task(largest=12).examples(s)} for s in ("train", "test")]
    assert sets[0] and sets[1] and not sets[0] & sets[1]


def test_examples_are_the_same_every_time_and_distinct():
    first = task().examples("test")
    assert first == task().examples("test")
    assert len({e.uid for e in first}) == len(first) == 100
    assert first != task(split_seed=1).examples("test")


def test_the_plain_form_stays_within_the_declared_characters():
    for example in task().examples("train"):
        assert set(example.prompt + example.completion) <= set(Countdown.characters)


def test_the_chat_form_asks_for_what_it_rewards():
    example = task(chat=True).examples("train")[0]
    (message,) = example.prompt
    assert message["role"] == "user" and "exactly once" in message["content"]
    assert all(str(n) in message["content"] for n in [*example.columns["numbers"], example.columns["target"]])
    assert example.completion.startswith("<answer>") and example.completion.endswith("</answer>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_numbers": 2}, "min_numbers = 2"),
        ({"max_numbers": 7}, "max_numbers = 7"),
        ({"largest": 1}, "largest"),
        ({"test_fraction": 0.0}, "test_fraction = 0.0"),
        ({"train_puzzles": 0}, "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="of 100 distinct test puzzles found"):
        task(largest=2, max_numbers=3).examples("test")
