import re

import pytest

from rewards import last_answer
from rewards.countdown import _expression
from rewards.format import Format


class Counted(str):
    """Text that counts the characters that are searched."""

    seen = 0

    def find(self, what, begin=0):
        found = super().find(what, begin)
        self.seen += (len(self) if found < 0 else found + len(what)) - begin
        return found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<answer>",
        "</answer>",
        "<answer>1</answer>",
        "<answer>1</answer> <answer>2</answer>",
        "<answer>1<answer>2</answer>",
        "<answer>1</answer></answer><answer>3",
        "<answer></answer>",
    ],
)
def test_it_finds_what_the_regular_expression_finds(text):
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert last_answer(text) == (found[-1] if found else None)


@pytest.mark.parametrize("part", ["<answer>", "</answer>", "<answer>x</answer>", "x"])
def test_the_work_grows_with_the_text(part):
    """On unclosed tags the regular expression reads n^2 / 16 characters: 6e8 of 1e5."""
    text = Counted(part * (100_000 // len(part)))
    last_answer(text)
    assert text.seen <= 2 * len(text)


def test_rewards_read_unclosed_tags_in_one_pass():
    text = "<answer>" * 12_500
    assert _expression(text) == text
    assert Format(Format.Config(pattern="answer"))([""], [text]) == [0.0]
