"""Dynamic sampling: groups that teach nothing make way for groups of newly drawn prompts.

Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, Section 3.2. Differs: rounds are bounded, a round decodes as many
prompts as are missing, and what is missing after the last one is filled with the groups that were to be replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dllm_rl.config.schema import Config
from dllm_rl.diffusion.advantage import share_of_group
from dllm_rl.driver.build import Run
from dllm_rl.driver.drawn import Drawn, collated, normalised
from dllm_rl.types import Prompt, Rewards, RolloutBatch


def resample(
    run: Run,
    config: Config,
    prompts: Sequence[Prompt],
    drawn: Drawn,
    step: int,
    draw: Callable[[Sequence[Prompt]], Drawn],
) -> tuple[list[Prompt], Drawn, dict[str, float]]:
    """A batch of the same size whose flat groups are replaced as far as data.resample_flat_groups rounds allow.

    What a round draws is a function of seed, step and round alone, from a shuffle of its own: batches are the same in
    any order, ahead of learning and after a resume, and the ordinary epochs go on as without it.

    Args:
        run: its parts.
        config: of the run.
        prompts: of the groups; group g belongs to prompts[g].
        drawn: their scored rollouts.
        step: of the batch.
        draw: decodes and scores further prompts.
    Returns:
        prompts, rollouts and metrics.
    """
    limit, chosen = config.data.resample_flat_groups, list(prompts)
    met = {prompt.uid for prompt in prompts}
    flat = _flat_groups(run, config, drawn)
    figures = {"flat_groups": len(flat) / len(prompts), "resample_rounds": 0.0, "resample_prompts": 0.0}
    for number in range(limit):
        spare = run.spare.batch(step * limit + number)
        # One of this step again would be decoded to the same completions.
        fresh = list({prompt.uid: prompt for prompt in spare if prompt.uid not in met}.values())[: len(flat)]
        if not fresh:
            continue
        met |= {prompt.uid for prompt in fresh}
        more = draw(fresh)
        figures["resample_rounds"] += 1
        figures["resample_prompts"] += len(fresh)
        useless = _flat_groups(run, config, more)
        place = dict(zip((g for g in range(len(fresh)) if g not in useless), flat, strict=False))
        for group, replaced in place.items():
            chosen[replaced] = fresh[group]
        drawn, flat = _replaced(drawn, more, place), flat[len(place) :]
    return chosen, drawn, figures | {"resampled/flat_groups": len(flat) / len(prompts)}


def kept(run: Run, config: Config, rewards: Rewards, batch: RolloutBatch) -> Tensor:
    """(N,) bool: rows to train on, by the algorithm and by data.keep_accuracy."""
    rows = run.algorithm.keep(rewards, batch)
    if config.data.keep_accuracy is None:
        return rows
    low, high = config.data.keep_accuracy
    share = share_of_group(rewards.solved, batch.group, rewards.included, batch.episode)
    return rows & (share >= low - 1e-6) & (share <= high + 1e-6)  # a fifth is not exact in float32


def _flat_groups(run: Run, config: Config, drawn: Drawn) -> list[int]:
    """Numbers of the groups of which no row is kept and has an advantage."""
    batch = collated(run, drawn)
    rewards = normalised(run, config, drawn.rewards, batch)
    value = run.algorithm.advantages(rewards, batch).abs()
    value = value.amax(-1) if value.dim() > 1 else value  # of tokens
    value = value.amax(0) if value.dim() > 1 else value  # of draws
    # Equal rewards may centre to a rounding error instead of 0.
    teaches = kept(run, config, rewards, batch) & (value > 1e-5 * rewards.total.abs())
    return sorted(set(batch.group.tolist()) - set(batch.group[teaches].tolist()))


def _replaced(first: Drawn, second: Drawn, place: Mapping[int, int]) -> Drawn:
    """The first's groups, with groups of the second in the places of some: place of a group's number in the second."""
    gone = set(place.values())
    stay = first.select([row for row, turn in enumerate(first.turns) if turn.group not in gone])
    come = second.select([row for row, turn in enumerate(second.turns) if turn.group in place])
    come = dataclasses.replace(come, turns=[dataclasses.replace(turn, group=place[turn.group]) for turn in come.turns])
    both = Drawn.join(stay, come)
    return both.select(sorted(range(len(both.turns)), key=lambda row: both.turns[row].group))
