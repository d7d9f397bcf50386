"""IGPO: groups that are all wrong are decoded again around pieces of a reference trace.

    hint      the trace, cut into chunks; a random share eta of them is injected, spread over the canvas
    replace   up to half of such a group by hinted rollouts that turned out right;  A = R - mean_group(R)
    phi_i     log p_theta(x_i | completion fully masked),   r = exp( mean_i [phi_i - phi_old_i] ) for all of a row
    J = 1/T sum_{i in F} [ min(r A, clip(r, 1-eps, 1+eps) A) - beta k3(phi_i, phi_ref_i) ]
    F         generated tokens, and of a row's hint tokens the share tau that the old policy was least sure of

Source: IGPO, arXiv:2509.10396.
Deviation: traces come without the answer, and no chunk is revealed for certain; the released code leaves the answer in
and always reveals the last chunk (``paper_exact: true`` does the latter; the answer stays out).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, ExtraRollout, Needs, Plan
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Prompt, Rewards, RolloutBatch


class IGPO(Algorithm):
    """GRPO with hints where nothing was right."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        shares: tuple[float, float] = (0.2, 0.6)  # eta ~ U: share of the trace's chunks that a hint reveals
        chunk: tuple[int, int] = (5, 10)  # tokens per chunk, drawn uniformly, both ends included
        reserve: int = 30  # canvas tokens at the end that hints leave free
        max_gap: int = 100  # tokens between two revealed chunks at most
        replaced: float = 0.5  # share of a group that hinted rollouts may replace
        hint_tokens: float = 0.2  # tau, share of a row's hint tokens that are trained on
        epsilon: float = 0.2  # clip half-width of the ratio
        beta: float = 0.01  # weight of KL(new || reference), nats per token
        scope: surrogate.Scope = "completion"  # of the ratio and the loss; the canvas holds what follows the end
        paper_exact: bool = False  # always reveal the last chunk, and train on the whole canvas

        def __post_init__(self) -> None:
            if not 0 < self.shares[0] <= self.shares[1] <= 1:
                raise UserError(f"shares = {self.shares}: need 0 < low <= high <= 1")
            if not 1 <= self.chunk[0] <= self.chunk[1]:
                raise UserError(f"chunk = {self.chunk}: need 1 <= low <= high")
            if not 0 < self.replaced <= 0.5:
                raise UserError(f"replaced = {self.replaced}: must be in (0, 0.5]")
            surrogate.Clipping.__post_init__(self)
            ranges.positive(hint_tokens=self.hint_tokens)
            ranges.not_negative(beta=self.beta, reserve=self.reserve)
            ranges.at_least_one(max_gap=self.max_gap)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0, entropy=True, traces=True, row_credit=True)

    @override
    def check_plan(self, plan: Plan) -> None:
        """Hints need a trace in every row and room on the canvas."""
        missing = next((e.uid for e in plan.examples if not e.trace), None)
        if missing is not None:
            raise UserError(
                f"algorithm 'igpo' cuts hints from a reference trace, row '{missing}' of task '{plan.task}' has none; "
                f"use gsm8k, math, or rows with data.task.trace, or another algorithm"
            )
        if self.config.reserve >= plan.sampling.max_new_tokens:
            raise UserError(
                f"algorithm.reserve = {self.config.reserve}: must be less than sampling.max_new_tokens = "
                f"{plan.sampling.max_new_tokens}, or there is no room for hints"
            )

    def extra_rollouts(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        batch: RolloutBatch,
        *,
        canvas: int,
        generator: torch.Generator,
    ) -> Sequence[ExtraRollout]:
        """As many hints as samples, for every group without a solved row; from short to long."""
        c, wanted = self.config, []
        wrong = ~advantage.any_of_group(rewards.solved, batch.group) & advantage.any_of_group(
            rewards.included, batch.group
        )
        for group in batch.group[wrong].unique().tolist():
            size = int((batch.group == group).sum())
            low, high = c.shares
            shares = low + (high - low) * torch.rand(size, generator=generator).sort().values
            for number, share in enumerate(shares.tolist()):
                prompt = prompts[group]
                given = cut_hint(
                    prompt.trace,
                    share=share,
                    chunk=c.chunk,
                    room=canvas - c.reserve,
                    max_gap=c.max_gap,
                    reveal_last=c.paper_exact,
                    generator=generator,
                )
                hinted = replace(prompt, uid=f"{prompt.uid}#hint{number}", injected=given)
                wanted.append(ExtraRollout(group=group, prompt=hinted))
        return wanted

    def select_rows(self, extra: Tensor, rewards: Rewards, batch: RolloutBatch, generator: torch.Generator) -> Tensor:
        """Right hinted rows take the places of the first rows of their group, at most a share of it."""
        rows: list[int] = []
        for group in batch.group.unique().tolist():
            own = (~extra & (batch.group == group)).nonzero().flatten()
            right = (extra & rewards.solved & (batch.group == group)).nonzero().flatten()
            right = right[torch.randperm(len(right), generator=generator)][: int(len(own) * self.config.replaced)]
            rows += [*own[len(right) :].tolist(), *right.tolist()]
        return torch.tensor(rows)

    @property
    def _scope(self) -> surrogate.Scope:
        return "canvas" if self.config.paper_exact else self.config.scope

    def _scored(self, batch: RolloutBatch) -> Tensor:
        return surrogate.scored_tokens(batch, self._scope)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A = R - mean of the group, not divided by the deviation."""
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One view: the whole completion masked, hints too."""
        return masking.fully_masked(self._scored(batch)).also_masking(batch.tail)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        c, batch, scored = self.config, experience.batch, self._scored(experience.batch)
        counts = experience.counts
        if self._scope == "canvas":  # which all rows have alike
            counts = dataclasses.replace(counts, num_tokens=counts.num_rows * int(scored.sum(-1).max()))
        assert experience.entropy is not None, "needs.entropy"
        trained = scored & (~batch.hint | least_sure(experience.entropy, batch.hint, c.hint_tokens))
        now, then = (surrogate.sequence_logp(one, experience, self._scope) for one in (new, experience.old))
        log_ratio = (now - then) / scored.sum(-1)
        every = torch.ones_like(log_ratio, dtype=torch.bool)
        gain = c.gain(log_ratio, experience.advantage, every, batch.group)[:, None].expand_as(new.token_logp)
        metrics = surrogate.ratio_metrics(log_ratio, experience.advantage, c, every, counts.num_rows)
        if c.beta > 0:
            assert experience.reference is not None, "beta > 0 means needs.reference"
            kl = surrogate.divergence(new.token_logp, experience.reference.token_logp, "k3")
            metrics["kl"] = surrogate.reduce(kl.detach(), trained, "token_mean", counts)
            gain = gain - c.beta * kl
        return Loss(-surrogate.reduce(gain, trained, "token_mean", counts), metrics)


def cut_hint(
    trace: Sequence[int],
    *,
    share: float,
    chunk: tuple[int, int],
    room: int,
    max_gap: int,
    reveal_last: bool = False,
    generator: torch.Generator,
) -> dict[int, int]:
    """Cut a trace into chunks, reveal some, spread them over the canvas.

        f = clip(room / length, 1, 1.5);  the first revealed chunk goes to floor(start f), every later one to the end of
        the one before plus min(floor(gap f), max_gap), where gap is what lay between the two in the trace

    Args:
        trace: tokens, at least one; what exceeds the room is cut off.
        share: of the chunks that is revealed, in (0, 1]; at least one.
        chunk: fewest and most tokens per chunk.
        room: canvas tokens that hints may use.
        max_gap: tokens between two revealed chunks at most.
        reveal_last: reveal the last chunk for certain.
        generator: CPU generator.
    Returns:
        canvas offset -> token; a chunk that would leave the room is dropped.
    Source: IGPO, arXiv:2509.10396; the short chunk at the end is kept, where the released code drops it.
    """
    tokens = list(trace)[:room]
    bounds = [0]
    while bounds[-1] < len(tokens):
        size = int(torch.randint(chunk[0], chunk[1] + 1, (), generator=generator))
        bounds.append(min(bounds[-1] + size, len(tokens)))
    chunks = list(itertools.pairwise(bounds))
    order: list[int] = torch.randperm(len(chunks), generator=generator).tolist()
    if reveal_last:
        order.remove(len(chunks) - 1)
        order.insert(0, len(chunks) - 1)
    revealed = sorted(order[: max(1, len(chunks) - int(len(chunks) * (1 - share)))])
    stretch = min(1.5, max(1.0, room / len(tokens)))
    injected: dict[int, int] = {}
    place = before = 0
    for number, index in enumerate(revealed):
        start, end = chunks[index]
        gap = int((start - before) * stretch)
        place += gap if number == 0 else min(gap, max_gap)
        if place + end - start > room:
            break
        injected |= {place + i: tokens[start + i] for i in range(end - start)}
        place, before = place + end - start, end
    return injected


def least_sure(entropy: Tensor, hint: Tensor, share: float) -> Tensor:
    """(N, L) bool: of each row's hint tokens the share with the highest entropy, at least one where there is any.

    Args:
        entropy: (N, L) nats.
        hint: (N, L) bool.
        share: in (0, 1].
    """
    count = (hint.sum(-1, keepdim=True) * share).floor().long().clamp(min=1)
    rank = entropy.masked_fill(~hint, float("-inf")).argsort(stable=True, dim=-1, descending=True).argsort(-1)
    return torch.logical_and(hint, rank < count)
