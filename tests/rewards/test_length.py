import pytest

from rewards.length import Length


def test_the_penalty_grows_linearly_over_the_margin():
    reward = Length(Length.Config(max_tokens=100, margin=20))
    tokens = [0, 80, 90, 100, 150]
    assert reward(["p"] * 5, ["x"] * 5, completion_tokens=tokens, answer=[""] * 5) == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize("margin", [0, 101])
def test_the_margin_lies_within_the_limit(margin):
    with pytest.raises(ValueError, match=f"margin = {margin}"):
        Length.Config(max_tokens=100, margin=margin)
