"""MDPO: GRPO on the steps of denoising, each of which is rewarded for the completion that the model predicts there.

    z_s   the canvas before step s;  x_s ~ p_theta(. | z_s) all of its masked tokens at once;  the surest are committed
    R_s   the reward of x_s,   c_s = R_s - R_{s-1} + mean_{s' > s} R_{s'}      (last step: c_s = R_s - R_{s-1} + R_s)
    A_s   c_s centred and normalised over the samples of a prompt, step by step;  K steps of largest sum |A_s| are kept
    J     = mean_rows [ 1/|M| sum_{i in M} f_i ( C/|M| min(r_i A, clip(r_i, 1-eps, 1+eps) A) - beta k2(l_i, l_ref_i) ) ]
    M     tokens masked in z_s, of C in the completion x_s;   l_i = log p_theta(x_i | z_s),   r_i = exp(l_i - l_old_i)
    f_i   = exp(l_old_i), the model's confidence

What is sampled at a step decides its own reward and, by what it commits, those of the steps after it. A step is a row:
``rollout: {rollouter: {name: denoising_steps}}`` makes an episode of them, with x_s as its completion and the committed
tokens given. ``sampling.tokens_per_step`` must be the whole canvas (and no block) for x_s to be one forward. Without
the rollouter a completion is the only step, scored along its trajectory.

Source: He et al. 2025, arXiv:2508.13148, and its code, whose form of c_s (adv-v4) and of the weights this is.
Deviation: tokens after EOS are not scored; log-probabilities are those of the model, where the released ones are
divided by the sampling temperature of 0.1; an end is predicted anew at every step, never committed; a sample that has
ended leaves the later steps of its group. R before the first step is 0, as released. Running-confidence remasking, a
decoding strategy of the paper, is not part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, per_draw, surrogate
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.protocols.rollouter import Decoder, Rollouter, Turn
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Prompt, Rewards, RolloutBatch


class DenoisingSteps(Rollouter):
    """An episode of denoising: every turn completes the canvas, and commits the tokens that the model is surest of.

    The end stays open: it is predicted anew at every step, and the episode is over once all before it is committed.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        tokens_per_step: int = 4  # tokens that a step commits; the next one predicts the others anew

        def __post_init__(self) -> None:
            ranges.at_least_one(tokens_per_step=self.tokens_per_step)

    rewarded = "turn"
    config: Config

    @override
    def roll_out(self, prompts: Sequence[Prompt], decoder: Decoder, *, samples_per_prompt: int) -> list[Turn]:
        """One engine call per step, with the samples that have not ended."""
        found = decoder.generate(prompts, samples_per_prompt=samples_per_prompt)
        groups = [row // samples_per_prompt for row in range(len(found))]
        last = [
            Turn(trajectory=trajectory, prompt=prompts[group], group=group, episode=row)
            for row, (trajectory, group) in enumerate(zip(found, groups, strict=True))
        ]
        turns, eos, number = list(last), decoder.tokenizer.eos_token_id, self.config.tokens_per_step
        while going := [(turn, sure) for turn in last if len(sure := self._surest(turn, eos)) > number]:
            states = [self._after(turn, sure[:number], samples_per_prompt) for turn, sure in going]
            last = [
                dataclasses.replace(turn, trajectory=trajectory, prompt=state, turn=turn.turn + 1)
                for (turn, _), state, trajectory in zip(going, states, decoder.generate(states), strict=True)
            ]
            turns += last
        return turns

    def _after(self, turn: Turn, committed: Sequence[int], samples_per_prompt: int) -> Prompt:
        """The state after a turn: what was given there, and the tokens at the offsets that it commits."""
        t, uid = turn.trajectory, turn.prompt.uid
        sample = uid.rpartition(".")[0] if turn.turn else f"{uid}#{turn.episode % samples_per_prompt}"
        new = {offset: int(t.tokens[t.prompt_length + offset]) for offset in committed}
        uid = f"{sample}.{turn.turn + 1}"  # randomness is keyed by it
        return dataclasses.replace(turn.prompt, uid=uid, injected={**turn.prompt.injected, **new})

    def _surest(self, turn: Turn, eos: int) -> list[int]:
        """Offsets of the generated tokens before the end, the surest first.

        An end is never among them: as given token it would be a token like others, with a completion after it.
        """
        t = turn.trajectory
        canvas = slice(t.prompt_length, t.prompt_length + t.completion_length)
        generated = (t.unmask_step[canvas] >= 0) & (t.tokens[canvas] != eos)
        order = t.behaviour_logp[canvas].masked_fill(~generated, float("-inf")).argsort(descending=True, stable=True)
        return order[: int(generated.sum())].tolist()


class MDPO(Algorithm):
    """Policy optimisation of the steps of denoising."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        steps: int = 16  # K, steps of a batch to train on: those of the largest advantages
        epsilon: float = 0.2  # clip half-width of the ratio, dimensionless
        beta: float = 0.0  # weight of the k2 divergence from the reference, nats per token

        def __post_init__(self) -> None:
            ranges.at_least_one(steps=self.steps)
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0, trajectory=True, draws=True)

    @override
    def keep(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """The rows of the K steps that have most to teach."""
        size = torch.zeros(int(batch.turn.max()) + 1, dtype=torch.float64)
        size.index_add_(0, batch.turn, _of_steps(rewards, batch).abs().double())
        best = size.argsort(descending=True, stable=True)[: self.config.steps]
        return rewards.included & torch.isin(batch.turn, best)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A_s C/|M|: a step that had little left to predict weighs more per token."""
        return _of_steps(rewards, batch) * _inverse_rate(batch)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """The states in which the tokens were predicted: one per row, if x_s was one forward."""
        return masking.along_trajectory(batch.unmask_step, batch.generated, block_ids=batch.block_ids)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        c, old = self.config, experience.old.draw_token_logp
        assert old is not None, "needs.draws"
        # The mean over a row's completion of what weighs C/|M| where masked is the mean over its masked tokens.
        factor = old.exp() * _inverse_rate(experience.batch)[:, None]
        return per_draw.clipped_loss(
            new, experience, epsilon=c, beta=c.beta, reduction="sequence_mean", kind="k2", factor=factor
        )


def _inverse_rate(batch: RolloutBatch) -> Tensor:
    """(N,) C/|M|: completion tokens per token that the row's state masks."""
    return batch.completion.sum(-1) / batch.generated.sum(-1).clamp(min=1)


def _of_steps(rewards: Rewards, batch: RolloutBatch) -> Tensor:
    """(N,) A_s: step scores, normalised over the rows of a prompt that are at the same step."""
    _, episode = batch.episode.unique(return_inverse=True)
    number, steps = int(episode.max()) + 1, int(batch.turn.max()) + 1
    reward = torch.zeros(number, steps)
    there = torch.zeros(number, steps)
    reward[episode, batch.turn], there[episode, batch.turn] = rewards.total, 1.0
    before = torch.cat([torch.zeros(number, 1), reward[:, :-1]], dim=1)
    after, left = (x.flip(1).cumsum(1).flip(1) - x for x in (reward, there))
    score = reward - before + torch.where(left > 0, after / left.clamp(min=1), reward)
    return advantage.z_score(score[episode, batch.turn], batch.group * steps + batch.turn, rewards.included)
