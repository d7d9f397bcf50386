"""The oracle: decodes one row at a time with a full forward per step. Slow and obvious; other engines must equal it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from dllm_rl.diffusion.decoding import POSITION_NOISE, TOKEN_NOISE, propose
from dllm_rl.diffusion.layout import block_index, block_rule
from dllm_rl.diffusion.schedule import ARRIVAL_NOISE, arrival, commits
from dllm_rl.models.evaluating import evaluating
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from dllm_rl.seeding import uniform
from dllm_rl.types import GIVEN, Prompt, Sampling, Trajectory, WeightsVersion
from rollouts.canvas import Request, both_logp, choose, requests, trajectory
from rollouts.torch_engine import TorchEngine


class ReferenceSampler:
    """Decodes row by row, block by block, recomputing everything at each forward."""

    def __init__(
        self,
        denoiser: Denoiser,
        strategy: UnmaskingStrategy,
        *,
        weights: WeightsVersion,
        keep_confidence: bool = False,
    ) -> None:
        """Hold a denoiser.

        Args:
            denoiser: shared with the learner in one process.
            strategy: which positions to commit.
            weights: version of the denoiser's weights; updated by the driver.
            keep_confidence: fill Trajectory.confidence, also if the strategy does not read the whole canvas itself.
        """
        self.weights = weights
        self._denoiser, self._strategy = denoiser, strategy
        self._whole = keep_confidence or strategy.reads_canvas

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        partial: Sequence[Trajectory] | None = None,
        max_blocks: int | None = None,
    ) -> list[Trajectory]:
        """Decode; see RolloutEngine.generate."""
        rows = requests(self._denoiser, prompts, sampling, seed, samples_per_prompt, partial)
        with torch.no_grad(), evaluating(self._denoiser.module):
            return [self._decode(request, sampling, max_blocks) for request in rows]

    def _decode(self, request: Request, sampling: Sampling, count: int | None) -> Trajectory:
        partial = request.partial
        if partial is not None and partial.finish != "paused":
            return partial
        denoiser, device = self._denoiser, self._denoiser.device
        start = len(request.prompt.token_ids)
        length = start + sampling.max_new_tokens
        size, origin = block_rule(denoiser, sampling)
        block_ids = block_index(torch.tensor([start], device=device), length, size, origin)
        tokens = request.tokens(length, denoiser.mask_id)[None].to(device)
        masked = request.masked(length, sampling.max_new_tokens)[None].to(device)
        valid = torch.ones_like(masked)
        step = torch.full((1, length), GIVEN, device=device)
        logp = torch.zeros(2, length, device=device)  # of the model, and of the distribution drawn from
        order = torch.zeros_like(step)
        seen: list[torch.Tensor] = []
        key = torch.tensor([[request.key]], device=device)
        position = torch.arange(length, device=device)[None]
        end_ids = torch.tensor(denoiser.end_ids, device=device)
        forward = 0
        if partial is not None:
            forward, seen = (
                partial.num_forwards,
                [] if partial.confidence is None else list(partial.confidence.to(device)),
            )
            step[0] = partial.unmask_step.masked_fill(partial.unmask_step == forward, GIVEN)
            logp[:] = both_logp(partial)
            order[0] = 0 if partial.order is None else partial.order
        for block in sorted(set(block_ids[0, start:].tolist()))[:count]:
            inside = (block_ids == block) & (position >= start)
            begun, first_forward = masked & inside, forward
            counts = commits(int(begun.sum()), size, sampling)
            while bool((active := masked & inside).any()):
                states = denoiser.hidden_states(
                    tokens, masked, valid, None if denoiser.block_size is None else block_ids
                )
                logits, unconditional = denoiser.unembed(states[0]), None
                if sampling.cfg_scale:
                    behind = masked | (step == GIVEN)  # the prompt too
                    unconditional = denoiser.unembed(denoiser.hidden_states(tokens, behind, valid)[0])
                # A block-causal forward computes a block; full attention the canvas, whatever may be committed.
                context = inside if denoiser.block_size is not None else position >= start
                visible = masked & context
                wanted = visible if self._whole else active
                noise = uniform(key, forward, position, TOKEN_NOISE)[0]
                p = propose(logits, sampling, noise, mask_id=denoiser.mask_id, unconditional=unconditional)
                number = counts[min(forward - first_forward, len(counts) - 1)]
                if sampling.schedule == "ancestral":
                    due = arrival(uniform(key, 0, position, ARRIVAL_NOISE), sampling.steps_per_block(size))[begun]
                    done = int((begun & ~masked).sum())
                    number = int((due <= due.sort().values[done]).sum()) - done
                candidates = Candidates(
                    eligible=active,
                    token=p.token[None],
                    logp=p.confidence[None].masked_fill(~wanted, float("-inf")),
                    entropy=p.entropy[None].masked_fill(~wanted, 0.0),
                    margin=p.margin[None].masked_fill(~wanted, 0.0),
                    noise=uniform(key, forward, position, POSITION_NOISE),
                    count=active.sum(-1).clamp(max=number),
                    context=context,
                    masked=visible,
                    time=torch.tensor([forward / sampling.max_new_tokens], device=device),
                )
                if self._whole:
                    seen.append(candidates.logp[0].exp().masked_fill(~visible[0], 0.0))
                order_now = choose(self._strategy, candidates)
                chosen = order_now > 0
                order = torch.where(chosen, order_now, order)
                tokens = torch.where(chosen, candidates.token, tokens)
                step = torch.where(chosen, forward, step)
                logp = torch.where(chosen, torch.stack([p.logp, p.sampled_logp]), logp)
                masked = masked & ~chosen
                forward += 1
            if bool((inside & (step != GIVEN) & torch.isin(tokens, end_ids)).any()):
                break
        return trajectory(
            request,
            sampling,
            tokens=tokens[0],
            unmask_step=step[0],
            logp=logp,
            order=order[0],
            confidence=torch.stack([torch.zeros(length, device=device), *seen])[1:] if self._whole else None,
            num_forwards=forward,
            denoiser=denoiser,
            weights=self.weights,
        )


class ReferenceEngine(TorchEngine):
    """Row by row over a denoiser of ours."""

    @override
    def sampler(self, strategy: UnmaskingStrategy, *, keep_confidence: bool = False) -> ReferenceSampler:
        return ReferenceSampler(self.denoiser, strategy, weights=self.weights, keep_confidence=keep_confidence)
