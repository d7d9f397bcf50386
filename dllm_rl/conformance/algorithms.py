"""What every training method must keep to; see dllm_rl.protocols.algorithm."""

from __future__ import annotations

import dataclasses
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from dllm_rl import seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases
from dllm_rl.conformance.violation import require
from dllm_rl.diffusion import likelihood
from dllm_rl.diffusion.advantage import per_row
from dllm_rl.learner.policy_scorer import PolicyScorer
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.protocols.algorithm import Algorithm, JointMasks, Needs, ReferenceMasks, ValueBaseline
from dllm_rl.types import (
    GIVEN,
    Experience,
    LikelihoodEstimate,
    MaskSample,
    Rewards,
    RolloutBatch,
    TrainingBatch,
    rows_of,
)

REPEATS = 400  # of the six rows: 2,400 draws for the partition of unity
TOLERANCE = 1e-10
UPDATES = 3  # optimiser updates of a step that draw masks of their own


class Subject:
    """An algorithm and the batches it is tried on."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.algorithm: Algorithm = build("algorithms", name, options)

        self.needs = self.algorithm.needs
        self.rolls_out = self.needs.source == "rollouts"
        self.scores_tokens = "model" in self.needs.trains

    def cases(self) -> list[tuple[RolloutBatch]]:
        """Full attention and block-causal."""
        return [(self.batch(block_causal),) for block_causal in (False, True)]

    def batch(self, block_causal: bool) -> RolloutBatch:
        """Rollouts in groups of three, demonstrations, or pairs."""
        size = {"rollouts": 3, "demonstrations": 1, "pairs": 2}[self.needs.source]
        return cases.batch(block_causal=block_causal, decoded=self.rolls_out, group_size=size)

    def scored(self) -> Rewards:
        """Rewards that differ within every group."""
        return cases.rewards(cases.PAIRS if self.needs.source == "pairs" else cases.MIXED)

    def masks(self, batch: RolloutBatch, seed: int = 0) -> MaskSample:
        """Draws of a seed."""
        return self.algorithm.masks(batch, seeding.generator_for(seed, "conformance", "masks"))

    def reference_masks(self, batch: RolloutBatch, masks: MaskSample, seed: int = 0) -> MaskSample:
        """What the reference is scored with."""
        if not isinstance(self.algorithm, ReferenceMasks):
            return masks
        return self.algorithm.reference_masks(batch, masks, seeding.generator_for(seed, "conformance", "reference"))

    def masks_of_updates(self, batch: RolloutBatch, seed: int) -> list[MaskSample]:
        """Draws of a seed for every optimiser update of a step: one entry unless needs.fresh_masks."""
        updates = UPDATES if self.needs.fresh_masks else 1
        if isinstance(self.algorithm, JointMasks):
            drawn = self.algorithm.joint_masks(batch, seeding.generator_for(seed, "conformance", "masks"), updates)
            require(len(drawn) == updates, f"joint_masks() gives {len(drawn)} entries for {updates} updates")
            return [self.masks(batch, seed), *drawn]
        later = range(1, updates)
        fresh = (self.algorithm.masks(batch, seeding.generator_for(seed, "conformance", "masks", u), u) for u in later)
        return [self.masks(batch, seed), *fresh]

    def estimate(self, batch: RolloutBatch, masks: MaskSample, *, seed: int) -> LikelihoodEstimate:
        """Plausible log-likelihoods, of tokens or of a policy's choices."""
        return cases.estimate(batch, masks, self.needs, seed=seed)

    def experience(self, batch: RolloutBatch) -> Experience:
        """With an old policy, and a reference if the algorithm says that it needs one."""
        scored = self.scored()
        masks = self.masks(batch)
        reference = self.estimate(batch, masks, seed=2) if self.needs.reference else None
        advantage = self.algorithm.advantages(scored, batch)
        return cases.experience(batch, scored, advantage, masks, self.estimate(batch, masks, seed=1), reference)

    def gradient(self, experience: Experience, new: LikelihoodEstimate) -> tuple[Tensor, Tensor]:
        """(loss, its derivatives): (N, L) by the tokens, summed over draws, then (N, T) by the choices of a policy."""
        leaves = {name: value.clone().requires_grad_() for name, value in new.differentiable.items()}
        loss = self.algorithm.loss(dataclasses.replace(new, **leaves), experience).value
        require(loss.dim() == 0 and bool(torch.isfinite(loss)), f"loss is {loss}, expected one finite number")
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))
        gradient = found["token_logp"] if self.scores_tokens else found["token_logp"][:, :0]
        if self.needs.draws:
            require(bool(found["draw_token_logp"].any()), "needs.draws = True, but the loss reads no draw_token_logp")
            gradient = gradient + (found["draw_token_logp"] * (experience.masks.weight != 0)).sum(0)
        return loss.detach(), torch.cat([gradient, *(found[n] for n in ("choice_logp",) if n in found)], dim=1)


def declares_itself(subject: Subject) -> None:
    """Config is a frozen dataclass, and needs asks for what training can give."""
    kind = type(subject.algorithm)
    require(kind.Config.__dataclass_params__.frozen, f"{kind.__name__}.Config is not frozen")  # type: ignore[attr-defined]
    sources, trainable = get_args(get_type_hints(Needs)["source"]), {"model", "policy"}
    require(subject.needs.source in sources, f"needs.source = {subject.needs.source!r}, allowed: {sources}")
    trains = subject.needs.trains
    require(bool(trains) and trains <= trainable, f"needs.trains = {set(trains)}, allowed: some of {trainable}")
    fed = isinstance(subject.algorithm, ValueBaseline) or not subject.needs.values
    require(fed, f"needs.values = True, but {kind.__name__} is no ValueBaseline")


def advantages_have_the_shape_of_rows_or_tokens(subject: Subject, batch: RolloutBatch) -> None:
    """advantages() gives finite float32 values: (N,), (N, L), or (K, N, L) for the K draws of masks()."""
    advantage, drawn = subject.algorithm.advantages(subject.scored(), batch), subject.masks(batch).mask
    require(
        advantage.shape in (drawn.shape[1:2], drawn.shape[1:], drawn.shape),
        f"shape {tuple(advantage.shape)} for {len(batch)} rows of {batch.tokens.shape[1]} tokens",
    )
    require(advantage.dtype == torch.float32, f"dtype {advantage.dtype}, expected float32")
    require(bool(torch.isfinite(advantage).all()), f"not finite: {advantage.tolist()}")


def excluded_rows_count_for_nothing(subject: Subject, batch: RolloutBatch) -> None:
    """A row whose verifier failed gets advantage 0, and the others' advantages are those of a batch without it."""
    if not subject.rolls_out:
        return
    for gone in (1, 3):
        rest = torch.tensor([row for row in range(len(batch)) if row != gone])
        scored = cases.rewards(cases.MIXED, excluded=gone)
        whole = subject.algorithm.advantages(scored, batch)
        alone = subject.algorithm.advantages(scored.select(rest), batch.select(rest))
        own, others = rows_of(whole, torch.tensor([gone])), rows_of(whole, rest)
        require(not bool(own.any()), f"excluded row {gone} has advantage {own.tolist()}")
        require(
            torch.allclose(others, alone, atol=1e-6),
            f"row {gone} failed: advantages of the others {others.tolist()}, without it {alone.tolist()}",
        )


def equal_rewards_teach_nothing(subject: Subject, batch: RolloutBatch) -> None:
    """A group whose rewards, and whose speeds, are all equal has advantage 0."""
    if not subject.rolls_out:
        return
    if subject.scores_tokens:  # else speed is forwards per canvas, equal in the case as it is
        batch = dataclasses.replace(batch, num_forwards=batch.completion.sum(-1))
    for value in (0.0, 1.0, 0.7):
        advantage = subject.algorithm.advantages(cases.rewards([value] * len(batch)), batch)
        require(float(advantage.abs().max()) < 1e-6, f"all rewards {value}: advantages {advantage.tolist()}")


def row_order_does_not_matter(subject: Subject, batch: RolloutBatch) -> None:
    """Advantages and kept rows move with their rows."""
    order = torch.tensor([1, 4, 5, 0, 3, 2])
    scored = subject.scored()
    for method in (subject.algorithm.advantages, subject.algorithm.keep):
        straight, moved = rows_of(method(scored, batch), order), method(scored.select(order), batch.select(order))
        require(
            torch.allclose(straight.double(), moved.double(), atol=1e-6),
            f"{method.__name__}: {straight.tolist()}, reordered {moved.tolist()}",
        )


def masks_are_drawn_from_the_generator_alone(subject: Subject, batch: RolloutBatch) -> None:
    """masks() gives (K, N, L) bool and float32; equal generators give equal draws, whatever happened before."""
    first, again = subject.masks(batch), subject.masks(batch)
    shape = (len(first.mask), *batch.tokens.shape)
    require(tuple(first.mask.shape) == tuple(first.weight.shape) == shape, f"shapes {first.mask.shape}")
    require(first.mask.dtype == torch.bool and first.weight.dtype == torch.float32, f"dtype {first.weight.dtype}")
    same = torch.equal(first.mask, again.mask) and torch.equal(first.weight, again.weight)
    require(same, "two generators of one seed gave different draws")


def no_token_is_scored_in_sight(subject: Subject, batch: RolloutBatch) -> None:
    """A weight other than 0 is only where the token is masked in that draw (no peeking)."""
    for masks in (masks for seed in range(20) for masks in subject.masks_of_updates(batch, seed)):
        seen = ((masks.weight != 0) & ~masks.mask).nonzero()
        require(not len(seen), f"draw {seen[0].tolist() if len(seen) else ''} (draw, row, position) is not masked")


def the_reference_scores_the_same_tokens(subject: Subject, batch: RolloutBatch) -> None:
    """The draws of reference_masks() have the weights of masks(), mask what they score, and no padding."""
    for seed in range(20):
        own = subject.masks(batch, seed)
        masks = subject.reference_masks(batch, own, seed)
        require(torch.equal(masks.weight, own.weight), "the weights differ")
        seen = ((masks.weight != 0) & ~masks.mask).nonzero()
        require(not len(seen), f"draw {seen[0].tolist() if len(seen) else ''} (draw, row, position) is not masked")
        require(not bool((masks.mask & ~batch.valid).any()), "padding is masked")


def only_the_completion_is_scored(subject: Subject, batch: RolloutBatch) -> None:
    """Prompt, padding and whatever follows the end have weight 0, and padding is not masked."""
    for masks in (masks for seed in range(20) for masks in subject.masks_of_updates(batch, seed)):
        outside = ((masks.weight != 0) & ~batch.completion).nonzero()
        require(not len(outside), f"weight at {outside[:1].tolist()} (draw, row, position), outside the completion")
        require(not bool((masks.mask & ~batch.valid).any()), "padding is masked")


def what_follows_the_end_is_not_shown(subject: Subject, batch: RolloutBatch) -> None:
    """Positions after the first EOS are masked in every draw that does not replay the trajectory."""
    if subject.needs.trajectory or not subject.scores_tokens or not subject.rolls_out:
        return
    for masks in subject.masks_of_updates(batch, 0):
        require(bool(masks.mask[:, batch.tail].all()), "a draw shows the canvas after EOS")


def weights_are_a_partition_of_unity(subject: Subject, batch: RolloutBatch) -> None:
    """Every completion token is counted once in expectation: E sum_k weight = 1. A policy alone draws nothing."""
    if not subject.scores_tokens:
        require(len(subject.masks(batch).mask) == 0, "masks() draws")
        return
    rows = torch.arange(len(batch)).repeat(REPEATS)
    for masks in subject.masks_of_updates(batch.select(rows), seed=1):
        total = masks.weight.double().sum(0).view(REPEATS, len(batch), -1)[:, batch.completion]
        error = 5 * total.std(0) / REPEATS**0.5 + 1e-6
        off = (total.mean(0) - 1).abs()
        worst = int((off - error).argmax())
        require(
            bool((off <= error).all()),
            f"a token's weights sum to {float(total.mean(0)[worst]):.3f} on average over {REPEATS} draws, expected 1 "
            f"within {float(error[worst]):.3f}",
        )


def trajectories_are_read_as_declared(subject: Subject, batch: RolloutBatch) -> None:
    """needs.trajectory is True exactly if masks() depends on unmask_step; a policy's choices always do."""
    if "policy" in subject.needs.trains:
        require(subject.needs.trajectory, "training a policy reads the trajectory: needs.trajectory must be True")
        return
    if not subject.rolls_out:
        return
    later = dataclasses.replace(
        batch, unmask_step=torch.where(batch.unmask_step == GIVEN, GIVEN, 3 - batch.unmask_step)
    )
    a, b = subject.masks(batch), subject.masks(later)
    depends = a.mask.shape != b.mask.shape or not torch.equal(a.mask, b.mask)
    declared = subject.needs.trajectory
    require(depends == declared, f"needs.trajectory = {declared}, but masks() {'reads' if depends else 'ignores'} it")


def behaviour_is_read_as_declared(subject: Subject, batch: RolloutBatch) -> None:
    """needs.behaviour_logp is True exactly if advantages() or loss() depends on behaviour_logp."""
    other = dataclasses.replace(batch, behaviour_logp=batch.behaviour_logp - batch.completion.float())
    first, second = subject.experience(batch), subject.experience(other)
    new = subject.estimate(batch, first.masks, seed=3)
    depends = subject.gradient(first, new)[0] != subject.gradient(second, new)[0]
    declared = subject.needs.behaviour_logp
    require(depends == declared, f"needs.behaviour_logp = {declared}, but it is {'' if depends else 'not '}read")


def old_policy_is_read_as_declared(subject: Subject, batch: RolloutBatch) -> None:
    """needs.old is True exactly if the loss depends on the old policy."""
    experience = subject.experience(batch)
    new = subject.estimate(batch, experience.masks, seed=3)
    other = dataclasses.replace(experience, old=subject.estimate(batch, experience.masks, seed=9))
    depends = not torch.equal(subject.gradient(experience, new)[1], subject.gradient(other, new)[1])
    declared = subject.needs.old
    require(depends == declared, f"needs.old = {declared}, but it is {'' if depends else 'not '}read")


def loss_reads_only_completions(subject: Subject, batch: RolloutBatch) -> None:
    """The loss is one finite number, and its gradient is 0 outside the completion."""
    experience = subject.experience(batch)
    _, gradient = subject.gradient(experience, subject.estimate(batch, experience.masks, seed=3))
    require(bool(torch.isfinite(gradient).all()), "the gradient is not finite")
    require(bool(gradient.any()), "the gradient is 0 everywhere")
    if not subject.scores_tokens:
        return
    tokens = gradient[:, : batch.tokens.shape[1]]
    require(not bool(tokens[~batch.completion].any()), "tokens outside the completion have a gradient")


def credit_per_token_is_taken_as_declared(subject: Subject, batch: RolloutBatch) -> None:
    """Advantages (N, L) that are equal within a row give the loss of (N,), unless needs.row_credit says (N,) alone."""
    experience = subject.experience(batch)
    if subject.needs.row_credit or not subject.rolls_out or not subject.scores_tokens or experience.advantage.dim() > 1:
        return
    tokens = experience.advantage[:, None].expand(batch.tokens.shape)
    new = subject.estimate(batch, experience.masks, seed=3)
    want = subject.gradient(experience, new)[0]
    try:
        got = subject.gradient(dataclasses.replace(experience, advantage=tokens), new)[0]
    except Exception as error:  # whatever it stumbles over
        require(False, f"{type(error).__name__} with advantages per token: {error}")
    require(abs(float(got - want)) <= TOLERANCE, f"{float(got)} with advantages per token, {float(want)} per row")


def loss_does_not_depend_on_sharding(subject: Subject, batch: RolloutBatch) -> None:
    """The losses of two halves of the batch, with the global counts, add up to the loss of the whole."""
    experience = subject.experience(batch)
    new = subject.estimate(batch, experience.masks, seed=3)
    whole, gradient = subject.gradient(experience, new)
    cut = 4 if subject.needs.source == "pairs" else 3
    parts = [torch.arange(cut), torch.arange(cut, len(batch))]
    losses, gradients = zip(
        *(subject.gradient(experience.select(rows, experience.counts), new.select(rows)) for rows in parts), strict=True
    )
    require(abs(float(sum(losses) - whole)) <= TOLERANCE, f"halves give {float(sum(losses))}, the whole {float(whole)}")
    require(torch.allclose(torch.cat(gradients), gradient, atol=TOLERANCE, rtol=0), "the gradients differ")


def better_rows_become_likelier(subject: Subject, batch: RolloutBatch) -> None:
    """At the old policy, a step down the loss raises rows of positive advantage and lowers rows of negative."""
    experience = subject.experience(batch)
    at_old = dataclasses.replace(experience, reference=None if experience.reference is None else experience.old)
    _, gradient = subject.gradient(at_old, experience.old)
    for row, value in enumerate(per_row(experience.advantage).tolist()):
        slope = -float(gradient[row].sum())
        require(
            value * slope > 0 or value == slope == 0, f"row {row}: advantage {value:g}, likelihood moves by {slope:g}"
        )


def reference_is_needed_as_declared(subject: Subject, batch: RolloutBatch) -> None:
    """needs.reference is True exactly if the loss reads the reference."""
    if not subject.needs.reference:
        return  # every other check has called loss() without a reference
    experience = subject.experience(batch)
    new = subject.estimate(batch, experience.masks, seed=3)
    other = dataclasses.replace(experience, reference=subject.estimate(batch, experience.masks, seed=9))
    same = subject.gradient(experience, new)[0] == subject.gradient(other, new)[0]
    require(not same, "needs.reference = True, but another reference gives the same loss")


def the_batch_is_left_as_it_was(subject: Subject, batch: RolloutBatch) -> None:
    """No method changes the batch, the rewards or the draws in place."""
    experience = subject.experience(batch)
    fresh = subject.batch(batch.block_ids is not None)
    subject.algorithm.keep(experience.rewards, batch)
    subject.gradient(experience, subject.estimate(batch, experience.masks, seed=3))
    for f in dataclasses.fields(RolloutBatch):
        value, was = getattr(batch, f.name), getattr(fresh, f.name)
        same = torch.equal(value, was) if isinstance(value, Tensor) else value == was
        require(same, f"batch.{f.name} was changed")
    require(torch.equal(experience.rewards.total, subject.scored().total), "rewards.total was changed")
    require(torch.equal(experience.masks.mask, subject.masks(batch).mask), "the draws were changed")


def the_learner_can_train_with_it(subject: Subject, batch: RolloutBatch) -> None:
    """One update of a tiny model, full attention and block-causal, gives finite figures and moves the weights."""
    family = "tiny" if batch.block_ids is None else "sdar"
    algorithm, scored = subject.algorithm, subject.scored()
    learner, masks = learner_for(subject.needs, batch, family), subject.masks(batch)
    before = learner.version().digest
    reference = None
    if subject.needs.reference:  # of another network: a divergence from the start has no gradient there
        seen, other = subject.reference_masks(batch, masks), cases.denoiser(family, seed=1)
        reference = [likelihood.estimate(other, batch, seen, draws=subject.needs.draws)]
    training = TrainingBatch(batch, scored, algorithm.advantages(scored, batch), [masks], reference)
    learner.update(training, algorithm)
    require(learner.version().digest != before, f"{family}: the weights did not move")


def learner_for(needs: Needs, batch: RolloutBatch, family: str, **settings: Any) -> TorchLearner:
    """A learner of a tiny model, and of an untrained policy if one is to be trained, for the cases' batches."""
    config = LearnerSection(**{"lr": 1e-3, **settings})
    policy = None
    if "policy" in needs.trains:
        policy = PolicyScorer(
            build("strategies", "learned", {"width": 16}),
            config.tokens_per_microbatch,
            block_size=cases.BLOCK,
            block_origin="response",
            sees_block_only=batch.block_ids is not None,
        )
    return TorchLearner(
        cases.denoiser(family),
        cases.tokenizer(),
        config,
        needs,
        total_steps=1,
        seed=0,
        policy=policy,
        dump_folder=Path(tempfile.gettempdir()) / f"dllm-rl-{secrets.token_hex(8)}",  # made only if it is needed
    )
