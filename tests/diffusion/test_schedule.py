"""How many positions each forward commits, against counts by hand and the law of the reverse process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dllm_rl.diffusion.schedule import Schedule, arrival, commits
from dllm_rl.seeding import uniform
from dllm_rl.types import GIVEN, Sampling

DRAWS = 20_000


@pytest.mark.parametrize(
    ("settings", "begun", "block", "want"),
    [
        ({}, 5, 8, [1]),
        ({"tokens_per_step": 3}, 5, 8, [3]),
        ({"steps": 12, "schedule": "uniform"}, 32, 32, [3] * 8 + [2] * 4),  # 32 = 12 * 2 + 8
        ({"steps": 12, "schedule": "uniform"}, 30, 32, [3] * 6 + [2] * 6),  # two tokens of the block are given
        ({"steps": 12, "schedule": "static"}, 30, 32, [3] * 8 + [2] * 4),  # as if they were not
        ({"steps": 16, "schedule": "uniform"}, 8, 8, [2] * 4),  # 16 steps of the canvas, 4 blocks
        ({"steps": 64, "schedule": "uniform"}, 8, 8, [1] * 8),  # 16 steps a block; 8 of them would commit nothing
        ({"steps": 64, "schedule": "uniform"}, 3, 8, [1] * 3),
        # times 1, 0.75025, 0.5005, 0.25075, 0.001: 8 * 0.24975 = 1.998, 7 * 0.333 = 2.33, 5 * 0.499 = 2.495, the rest
        ({"steps": 4, "schedule": "timesteps"}, 8, 32, [1, 2, 2, 3]),
        ({"tokens_per_step": 8, "schedule": "timesteps"}, 8, 32, [1, 2, 2, 3]),
        ({"steps": 1, "schedule": "timesteps"}, 8, 32, [8]),
    ],
)
def test_counts_by_hand(settings, begun, block, want):
    assert list(commits(begun, block, Sampling(max_new_tokens=32, **settings))) == want


@pytest.mark.parametrize("steps", [1, 2, 7, 32, 100, 512])
@pytest.mark.parametrize("begun", [1, 31, 256])
def test_timesteps_counts_equal_its_recurrence_in_float32(begun, steps):
    time, left, want = torch.linspace(1, 1e-3, steps + 1).numpy(), begun, []
    for i in range(steps):
        share = np.float32(1) - time[i + 1] / time[i]
        count = int(np.float32(left) * share) if i < steps - 1 else left
        left -= count
        want += [count] if count else []
    got = commits(begun, 256, Sampling(max_new_tokens=256, steps=steps, schedule="timesteps"))
    assert list(got) == want and sum(got) == begun


def test_arrivals_follow_the_reverse_process():
    """A position that is masked at t is unmasked by s with probability 1 - s/t; the last step takes what is left."""
    steps = 5
    time = torch.linspace(1, 1e-3, steps + 1).double()
    step = arrival(uniform(torch.arange(DRAWS), 0, 0), steps)
    assert step.min() == 0 and step.max() == steps - 1
    for i in range(steps - 1):
        waiting = step >= i
        want, number = 1 - time[i + 1] / time[i], waiting.sum()
        share = (step[waiting] == i).double().mean()
        assert (share - want).abs() <= 4 * (want * (1 - want) / number).sqrt(), (i, share, want)
    assert (arrival(uniform(torch.arange(9), 0, 0), 1) == 0).all()


@pytest.mark.parametrize("schedule", ["static", "uniform", "timesteps", "ancestral"])
def test_rows_at_different_forwards_get_their_own_counts(schedule):
    """Rows with 3 to 8 masked positions of a block of 8, each decoded by its counts until nothing is left."""
    sampling = Sampling(max_new_tokens=8, steps=3, schedule=schedule)
    begun = torch.tensor([8, 5, 3, 8, 6])
    given = torch.arange(8) >= begun[:, None]
    step, forward = torch.full((5, 8), GIVEN), torch.tensor([0, 7, 0, 2, 0])
    key, position = torch.arange(5) + 100, torch.arange(8).expand(5, 8)
    masked, inside = ~given, torch.ones(5, 8, dtype=torch.bool)
    table = Schedule(sampling, 8, begun, torch.device("cpu"))
    seen = [[] for _ in range(5)]
    while masked.any():
        count = table.count(masked, inside, step, key=key, forward=forward, position=position)
        assert ((count >= 1) == masked.any(-1)).all() and (count <= masked.sum(-1)).all()
        chosen = masked & (masked.cumsum(-1) <= count[:, None])
        step = torch.where(chosen, forward[:, None], step)
        for row in range(5):
            seen[row] += [int(count[row])] if count[row] else []
        forward, masked = forward + masked.any(-1), masked & ~chosen
    if schedule == "ancestral":
        due = arrival(uniform(key[:, None], 0, position, 3), 3)
        want = [torch.bincount(due[row, : begun[row]], minlength=3).tolist() for row in range(5)]
        assert seen == [[n for n in numbers if n] for numbers in want] and len({len(n) for n in seen}) > 1
        return
    for row, counts in enumerate(seen):
        left, want = int(begun[row]), []
        for number in commits(left, 8, sampling):
            want += [min(number, left)] if left else []
            left -= min(number, left)
        assert counts == want and sum(counts) == begun[row]


def test_steps_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"sampling.steps = 6 do not divide over 32 tokens in blocks of 8; .* of 4"):
        Sampling(max_new_tokens=32, block_size=8, steps=6)
    with pytest.raises(ValueError, match="do not divide over 32 tokens in blocks of 4"):
        Schedule(Sampling(max_new_tokens=32, steps=4, schedule="uniform"), 4, torch.tensor([4]), torch.device("cpu"))
