import time

import pytest

from rewards.countdown import Countdown, parse

NUMBERS, TARGET = [44, 19, 35], 98


def score(completion: str, numbers=NUMBERS, target=TARGET, **options):
    reward = Countdown(Countdown.Config(**options))
    (verdict,) = reward(["p"], [completion], numbers=[numbers], target=[target])
    return float(verdict), verdict.status


@pytest.mark.parametrize(
    "completion",
    [
        "44+19+35",
        "35 + ( 44 + 19 )",
        "First try.\n<answer>1+1</answer> no:\n<answer>\n44+19+35\n</answer> so it is",
        "I add them up.\n44+19+35\n\n",
        "44+19+35 = 98",
    ],
)
def test_the_last_answer_or_the_last_line_is_judged(completion):
    assert score(completion) == (1.0, "ok")


def test_values_are_exact_fractions():
    assert score("1/3*3", [1, 3, 3], 1) == (1.0, "ok")
    assert score("(1-1/3)*6/4", [1, 1, 3, 6, 4], 1) == (1.0, "ok")
    assert score("10-4-3", [10, 4, 3], 3) == (1.0, "ok")  # from left to right
    assert score("24/4/3", [24, 4, 3], 2) == (1.0, "ok")
    assert score("2+3*4", [2, 3, 4], 14) == (1.0, "ok")
    assert score("999983/999979*999979", [999983, 999979, 999979], 999983) == (1.0, "ok")


def test_right_numbers_and_wrong_value_earn_partial_credit():
    assert score("44+19-35") == (0.1, "ok")
    assert score("44+19-35", partial=0.0) == (0.0, "ok")
    assert score("44-19-35") == (0.1, "ok")  # a negative value is a value


@pytest.mark.parametrize("completion", ["44+19", "44+19+35+35", "98", "44+54", "44+19+34+1"])
def test_each_number_exactly_once(completion):
    assert score(completion) == (0.0, "ok")


@pytest.mark.parametrize(
    "completion",
    [
        "44**19**35",
        "44//19//35",
        "4.4+19+35",
        "44+19+35.0",
        "-44+19+35",
        "44+-19+35",
        "+44+19+35",
        "44 19 35",
        "4 4+19+35",
        "44+19+",
        "(44+19+35",
        "44+19+35)",
        "()",
        "44(19)35",
        "44/(19-19)+35",
        "44^19^35",
        "44+19+٣٥",
        "\uff14\uff14+19+35",  # full-width digits
        "44+19+3_5",
        "44+19+0x23",
        "44e1+19+35",
        "__import__('os')",
        "9" * 5000,
        "9" * 7 + "+1+1",
        "(" * 3000 + "44" + ")" * 3000,
        "(" * 21 + "44" + ")" * 21 + "+19+35",
        "<answer></answer>",
        "<mask>44+19+35",
        "",
        "\n \n",
    ],
)
def test_what_is_not_in_the_grammar_is_invalid_at_once(completion):
    started = time.perf_counter()
    assert score(completion) == (0.0, "invalid")
    assert time.perf_counter() - started < 0.1


def test_parse_lists_the_numbers_in_order():
    assert parse("(5-3)*12/8") == (3, [5, 3, 12, 8])


@pytest.mark.parametrize("partial", [-0.1, 1.0])
def test_partial_credit_is_less_than_success(partial):
    with pytest.raises(ValueError, match=f"partial = {partial}"):
        Countdown.Config(partial=partial)
