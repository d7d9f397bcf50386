"""Scores tokens with the model that is trained, and with the reference."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.config.cluster import ReferenceSection
from dllm_rl.diffusion import likelihood
from dllm_rl.diffusion.likelihood import Work
from dllm_rl.errors import UserError
from dllm_rl.learner.moving_reference import MovingReference
from dllm_rl.learner.scorer import Share
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.digest import digest
from dllm_rl.models.evaluating import evaluating
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import add_second_adapter, load_adapter, reference_weights, save_adapter
from dllm_rl.models.teacher import AutoregressiveTeacher, Teacher
from dllm_rl.types import LikelihoodEstimate, MaskSample, RolloutBatch, Sampling

Scored = tuple[Tensor, Tensor, Tensor]
Scoring = Callable[..., Scored]  # likelihood.score or likelihood.entropy


class ModelScorer:
    """The Scorer of a denoiser: fills in token_logp and draw_token_logp.

    Attributes:
        moving: moves the reference after updates of the policy; None if it is frozen, or if there is none.
    """

    def __init__(
        self,
        denoiser: TransformersDenoiser,
        tokenizer: Any,
        tokens_per_microbatch: int,
        *,
        reference: ReferenceSection | None,
        seed: int,
    ) -> None:
        """Look at what is trainable.

        Args:
            denoiser: trained in place.
            tokenizer: saved beside the weights.
            tokens_per_microbatch: bound on padded tokens per forward.
            reference: hold one: a copy of the model, or with LoRA the base below the adapter, which costs nothing, and
                a second adapter on it if the reference moves or the run goes on with an adapter; None = no reference.
            seed: run seed, for a reference that moves.
        """
        self.denoiser, self.ticks = denoiser, 0
        self.trained: Sequence[tuple[str, nn.Parameter]] = [
            (n, p) for n, p in denoiser.module.named_parameters() if p.requires_grad
        ]
        self._tokenizer, self._budget = tokenizer, tokens_per_microbatch
        self._reference: Teacher | None = None
        self.moving: MovingReference | None = None
        if reference is not None and denoiser.adapter is None:
            self._reference = copy.deepcopy(denoiser)
            self._reference.module.requires_grad_(False).eval()
        if reference is not None and reference.kind == "ema":
            self.moving = MovingReference(self._followers(), reference, seed=seed)
        elif reference is not None and denoiser.adapter_config is not None:
            add_second_adapter(denoiser)  # the start of the run is the base with the adapter that was loaded

    def hold(self, teacher: Teacher) -> None:
        """Take another network as the reference, frozen."""
        self._reference = teacher

    def plan(self, batch: RolloutBatch, masks: MaskSample) -> list[Work]:
        """Micro-batches; the same number on every rank."""
        return likelihood.plan(batch, masks, self._budget)

    def add(
        self, estimate: LikelihoodEstimate, batch: RolloutBatch, masks: MaskSample, work: Sequence[Work], *, draws: bool
    ) -> LikelihoodEstimate:
        """An estimate with the tokens' log-probabilities, with graph (and dropout) if gradients are enabled."""
        forward = functools.partial(self._forward, likelihood.score, batch, masks)
        graph = torch.is_grad_enabled()
        if graph:
            self.denoiser.module.train()
        with contextlib.nullcontext() if graph else evaluating(self.denoiser.module):
            found = likelihood.summed(batch, masks, work, forward, draws=draws)
        return dataclasses.replace(found, choice_logp=estimate.choice_logp)

    def shares(self, batch: RolloutBatch, masks: MaskSample, slope: LikelihoodEstimate) -> list[Share]:
        """What to take the gradient of: the derivatives play the part of the weights."""
        factor = slope.token_logp.cpu() * masks.weight
        if slope.draw_token_logp is not None:
            factor = factor + slope.draw_token_logp.cpu()
        # Tokens that the loss does not depend on (zero advantage, say) are not forwarded again: their factor is zero.
        needed = MaskSample(mask=masks.mask, weight=torch.where(masks.weight != 0, factor, 0.0))
        self.denoiser.module.train()
        return [functools.partial(self._share, batch, needed, part) for part in self.plan(batch, needed)]

    def reference(self, batch: RolloutBatch, masks: MaskSample, *, draws: bool) -> LikelihoodEstimate:
        """Likelihoods without gradient under the reference, as it is now."""
        if self._reference is None and self.denoiser.adapter is None:
            raise RuntimeError("the learner holds no reference: it was made without one, or it has been dropped")
        forward = self._forward if self._reference is None else self._reference_forward
        below_adapter = reference_weights(self.denoiser) if self._reference is None else contextlib.nullcontext()
        if isinstance(self._reference, AutoregressiveTeacher):
            assert not draws, "build_run() refuses it"
            masks = _left_to_right(masks)
        with torch.no_grad(), evaluating(self.denoiser.module), below_adapter:
            scored = functools.partial(forward, likelihood.score, batch, masks)
            return likelihood.summed(batch, masks, self.plan(batch, masks), scored, draws=draws)

    def entropy(self, batch: RolloutBatch, masks: MaskSample) -> Tensor:
        """(N, L) nats at the scored positions, averaged over the draws that score them."""
        once = MaskSample(mask=masks.mask, weight=(masks.weight != 0).float())
        forward = functools.partial(self._forward, likelihood.entropy, batch, once)
        with evaluating(self.denoiser.module):
            found = likelihood.summed(batch, once, self.plan(batch, once), forward)
        return found.token_logp / once.weight.sum(0).clamp(min=1)

    def drawn(self, batch: RolloutBatch, masks: MaskSample, sampling: Sampling) -> LikelihoodEstimate:
        """Likelihoods without gradient under the distribution that tokens are drawn from."""
        forward = functools.partial(self._forward, functools.partial(likelihood.score, sampling=sampling), batch, masks)
        with torch.no_grad(), evaluating(self.denoiser.module):
            return likelihood.summed(batch, masks, self.plan(batch, masks), forward)

    def reference_digest(self) -> str:
        """Of the frozen copy, or of the base below the adapter."""
        if self._reference is not None:
            return digest(self._reference.module.named_parameters())
        return digest((n, p) for n, p in self.denoiser.module.named_parameters() if not p.requires_grad)

    def drop_reference(self) -> None:
        """Free the frozen copy; with LoRA there is none."""
        self._reference = None

    def save(self, folder: Path) -> None:
        """Write the weights in the family's layout, or the adapter."""
        if self.denoiser.adapter is not None:
            save_adapter(self.denoiser, folder)
        else:
            save_denoiser(self.denoiser, self._tokenizer, folder)

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit.

        Raises:
            UserError: a folder of another model.
        """
        if self.denoiser.adapter is not None:
            load_adapter(self.denoiser, folder)
            return
        family, dtype = self.denoiser.family, next(self.denoiser.module.parameters()).dtype
        saved = dict(load_denoiser(folder, family=family, dtype=dtype)[0].module.named_parameters())
        own = dict(self.denoiser.module.named_parameters())
        odd = sorted(
            n for n in saved.keys() | own.keys() if n not in saved or n not in own or saved[n].shape != own[n].shape
        )
        if odd:
            raise UserError(
                f"checkpoint '{folder}' is of another model: {', '.join(odd[:3])} differ; resume its own run"
            )
        with torch.no_grad():
            for name, value in saved.items():
                own[name].copy_(value)

    def _followers(self) -> list[tuple[list[nn.Parameter], list[nn.Parameter]]]:
        """Parameters of the reference, and those that they follow."""
        if self._reference is None:
            return add_second_adapter(self.denoiser)
        own = dict(self._reference.module.named_parameters())
        return [([own[name]], [parameter]) for name, parameter in self.trained]

    def _share(self, batch: RolloutBatch, needed: MaskSample, part: Work) -> Tensor:
        logp, pair, position = self._forward(likelihood.score, batch, needed, part)
        return (logp * likelihood.weights(needed, part, pair, position)).sum()

    def _forward(self, function: Scoring, batch: RolloutBatch, masks: MaskSample, work: Work) -> Scored:
        """A function of likelihood.py on the trained network."""
        self.ticks += 1
        return function(self.denoiser, batch, masks, work)

    def _reference_forward(self, function: Scoring, *arguments: Any) -> Scored:
        """The same on the copy."""
        self.ticks += 1
        return function(self._reference, *arguments)


def _left_to_right(masks: MaskSample) -> MaskSample:
    """One draw that masks nothing, with the weights of all: what a token's one log-probability is multiplied by."""
    return MaskSample(mask=torch.zeros_like(masks.mask[:1]), weight=masks.weight.sum(0, keepdim=True))
