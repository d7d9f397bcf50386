import pytest

from rewards.format import Format


def score(completion: str, **options) -> float:
    (value,) = Format(Format.Config(**options))(["p"], [completion], answer=["a"])
    return value


@pytest.mark.parametrize(
    ("completion", "value"),
    [("so \\boxed{1}", 1), ("\\boxed{\\frac{1}{2}}", 1), ("\\boxed{1", 0), ("\boxed{1}", 0), ("boxed", 0), ("", 0)],
)
def test_boxed(completion, value):
    assert score(completion) == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<reasoning>one\ntwo\n\nthree</reasoning>\n<answer>4\n</answer>\n", 1),  # a released reward gives 0 here
        ("<reasoning></reasoning><answer></answer>", 1),
        ("<reasoning>a</reasoning><answer>4</answer> more", 0),
        ("<reasoning>a</reasoning> and <answer>4</answer>", 0),
        ("<reasoning>a</reasoning><answer>4</answer><answer>5</answer>", 0),
        ("<reasoning>a<reasoning>b</reasoning><answer>4</answer>", 0),
        ("<answer>4</answer>", 0),
    ],
)
def test_reasoning_answer(completion, value):
    assert score(completion, pattern="reasoning_answer") == value


def test_a_pattern_of_ones_own_is_searched_across_lines():
    assert score("a\nb\nc", pattern="a.*c") == 1
    assert score("x <answer>1\n2</answer> y", pattern="answer") == 1
    assert score("abx", pattern="^a.c") == 0


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match=r"pattern = '\(': not a regular expression"):
        Format.Config(pattern="(")
