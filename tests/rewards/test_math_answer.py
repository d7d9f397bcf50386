import pytest

from rewards.math_answer import MathAnswer, last_boxed


def score(completion: str, answer: str, **options):
    (verdict,) = MathAnswer(MathAnswer.Config(**options))(["p"], [completion], answer=[answer])
    return float(verdict), verdict.status


@pytest.mark.parametrize(
    ("boxed", "answer"),
    [
        ("72", "72"),
        ("72.0", "72"),
        ("\\$72", "72"),
        ("1,024", "1024"),
        ("18\\text{ dollars}", "18"),
        ("14/3", "\\frac{14}{3}"),
        ("\\dfrac{14}{3}", "\\frac{14}{3}"),
        ("q-q+p - q", "p - q"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("\\text{ Evelyn }", "\\text{Evelyn}"),
        ("2007 + \\frac\\pi 2", "2007 + \\frac\\pi 2"),
        ("x = 5", "5"),
        ("\\$", "\\$"),  # math-verify reads nothing in it: equal as text
    ],
)
def test_equal_answers(boxed, answer):
    assert score(f"So it is \\boxed{{{boxed}}}.", answer) == (1.0, "ok")


@pytest.mark.parametrize(
    ("boxed", "answer"), [("71", "72"), ("-72", "72"), ("1", "1,2"), ("1010", "10"), ("0.33", "1/3")]
)
def test_different_answers(boxed, answer):
    assert score(f"\\boxed{{{boxed}}}", answer) == (0.0, "ok")


def test_the_last_box_counts_alone():
    assert score("\\boxed{13}, no: \\boxed{12}", "12") == (1.0, "ok")
    assert score("\\boxed{12}, no: \\boxed{13}", "12") == (0.0, "ok")
    assert score("\\boxed{12} or \\boxed{13", "12") == (1.0, "ok")  # the last one that is closed


def test_the_reference_comes_first():
    """math-verify takes an interval for an inequality, but not an inequality for an interval."""
    assert score("\\boxed{(-\\infty,3)}", "x<3") == (1.0, "ok")
    assert score("\\boxed{x<3}", "(-\\infty,3)") == (0.0, "ok")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "72",
        "The answer is 72.",
        "\boxed{72}",
        "boxed{72}",
        "\\boxed 72",
        "\\boxed{}",
        "\\boxed{\\$}",
        "\\boxed{72",
        "\\boxed{" + "7" * 2000 + "}",
    ],
)
def test_no_boxed_answer_is_invalid(completion):
    assert score(completion, "72") == (0.0, "invalid")


def test_without_a_box_the_text_may_be_searched():
    assert score("The answer is 72.", "72", require_boxed=False) == (1.0, "ok")
    assert score("", "72", require_boxed=False) == (0.0, "invalid")


def test_a_row_without_reference_cannot_be_judged():
    with pytest.raises(ValueError, match="no reference answer"):
        score("\\boxed{72}", "")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{a}", "a"),
        ("\\boxed {a}", "a"),
        ("\\boxed{\\frac{1}{2}} then", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{two\nlines}", "two\nlines"),
        ("\\boxed{a\\\\b}", "a\\\\b"),
        ("\boxed{a}", None),
        ("\\boxed{a", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_the_tasks_scanner_agrees_with_the_rewards():
    """data may not import rewards, so each has its own; the same text must not have two answers."""
    from dllm_rl.tasks.math_word import _last_boxed

    for text in ("\\boxed{\\frac{1}{2}}", "\\boxed{1} \\boxed{\\{2\\}}", "\\boxed{1} \\boxed{2", "none", "\\boxed {x}"):
        assert last_boxed(text) == _last_boxed(text)
