import pytest

from dllm_rl.data.source import PromptSource


def test_every_epoch_holds_every_item_once_whatever_the_batch_size():
    for per_step in (1, 3, 7, 10, 23):
        source = PromptSource(list(range(10)), per_step, seed=0)
        stream = [item for step in range(100) for item in source.batch(step)]
        epochs = [stream[start : start + 10] for start in range(0, len(stream) - 9, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_a_batch_depends_on_seed_and_step_alone():
    one = PromptSource(list(range(50)), 8, seed=3)
    in_order = [one.batch(step) for step in range(20)]
    other = PromptSource(list(range(50)), 8, seed=3)
    assert [other.batch(step) for step in reversed(range(20))] == in_order[::-1]
    assert PromptSource(list(range(50)), 8, seed=4).batch(0) != in_order[0]


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="training split is empty"):
        PromptSource([], 4, seed=0)
