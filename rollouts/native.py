"""The fast engine in plain torch: batched, exact.

Full attention: no cache exists that is exact, so each forward recomputes the rows that are left. Block-causal families:
keys and values of finished blocks are cached exactly, a forward computes one block. Only masked rows of the active
block are unembedded, rows that finished leave the batch, and nothing loops over rows in Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.config.plugins import plugin_class
from dllm_rl.diffusion.decoding import POSITION_NOISE, TOKEN_NOISE, propose
from dllm_rl.diffusion.layout import block_index, block_rule
from dllm_rl.diffusion.schedule import Schedule
from dllm_rl.models.cache import BlockCache
from dllm_rl.models.evaluating import evaluating
from dllm_rl.protocols.denoiser import CacheType, Denoiser
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from dllm_rl.seeding import uniform
from dllm_rl.types import GIVEN, Prompt, Sampling, Trajectory, WeightsVersion
from rollouts.canvas import Request, both_logp, choose, requests, trajectory
from rollouts.torch_engine import TorchEngine

CHUNK_ELEMENTS = 1 << 25  # 0.7 GB at the peak of a greedy choice, 1.5 GB with top-k and top-p


@dataclass(slots=True)
class _Rows:
    """State of the rows that are still decoding; every tensor has one entry per row.

    row (N,) index into the batch's requests; tokens, masked, due (to be decoded in this call), valid, canvas, step,
    order, block_ids (N, L); logp (N, 2, L) of the model and of the distribution drawn from; confidence (N, T, L), T = 0
    unless it is kept; key, forward (N,).
    """

    row: Tensor
    tokens: Tensor
    masked: Tensor
    due: Tensor
    valid: Tensor
    canvas: Tensor
    step: Tensor
    logp: Tensor
    order: Tensor
    confidence: Tensor
    block_ids: Tensor
    key: Tensor
    forward: Tensor

    def keep(self, rows: Tensor) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def restore(self, row: int, partial: Trajectory) -> None:
        """Put a row where it was paused; tokens and masked are there already."""
        forwards, length = partial.num_forwards, len(partial.tokens)
        self.forward[row] = forwards
        self.step[row, :length] = partial.unmask_step.masked_fill(partial.unmask_step == forwards, GIVEN)
        self.logp[row, :, :length] = both_logp(partial)
        if partial.order is not None:
            self.order[row, :length] = partial.order
        if partial.confidence is not None and self.confidence.shape[1]:
            self.confidence[row, :forwards, :length] = partial.confidence

    @property
    def given(self) -> Tensor:
        """(N, L) bool: prompt and injected tokens."""
        return self.valid & ~self.masked & (self.step == GIVEN)

    @property
    def left(self) -> Tensor:
        """(N, L) bool: still to be decoded in this call."""
        return self.masked & self.due


class NativeSampler:
    """Decodes rows in batches."""

    def __init__(
        self,
        denoiser: Denoiser,
        strategy: UnmaskingStrategy,
        *,
        weights: WeightsVersion,
        max_batch_tokens: int = 1 << 16,
        keep_confidence: bool = False,
        chunk_elements: int = CHUNK_ELEMENTS,
        cache_type: CacheType = BlockCache,
    ) -> None:
        """Hold a denoiser.

        Args:
            denoiser: shared with the learner in one process.
            strategy: which positions to commit.
            weights: version of the denoiser's weights; updated by the driver.
            max_batch_tokens: padded tokens per forward at most (one row may exceed it).
            keep_confidence: fill Trajectory.confidence, also if the strategy does not read the whole canvas itself.
            chunk_elements: logits held at once at most (the logits of one position may exceed it).
            cache_type: of keys and values; block-causal families only.
        """
        self.weights = weights
        self._denoiser, self._strategy = denoiser, strategy
        self._max_batch_tokens, self._chunk_elements = max_batch_tokens, chunk_elements
        self._whole = keep_confidence or strategy.reads_canvas
        self._cache_type = cache_type
        self._end_ids = torch.tensor(denoiser.end_ids)

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
        wanted = requests(self._denoiser, prompts, sampling, seed, samples_per_prompt, partial)
        finished = {r.index: r.partial for r in wanted if r.partial is not None and r.partial.finish != "paused"}
        todo = [request for request in wanted if request.index not in finished]
        self._end_ids = self._end_ids.to(self._denoiser.device)  # once: at every forward it would wait for the device
        todo.sort(key=lambda request: len(request.prompt.token_ids))
        decode = self._decode_full if self._denoiser.block_size is None else self._decode_blocks
        with torch.no_grad(), evaluating(self._denoiser.module):
            for batch in self._batches(todo, sampling):
                rows, schedule = self._start(batch, sampling, max_blocks)
                finished.update(decode(rows, batch, sampling, schedule))
        return [finished[index] for index in range(len(wanted))]

    def _batches(self, todo: list[Request], sampling: Sampling) -> Iterator[list[Request]]:
        batch: list[Request] = []
        for request in todo:  # sorted, so the newest is the longest
            width = len(request.prompt.token_ids) + sampling.max_new_tokens
            if batch and width * (len(batch) + 1) > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _start(self, batch: list[Request], sampling: Sampling, count: int | None) -> tuple[_Rows, Schedule]:
        start = torch.tensor([len(request.prompt.token_ids) for request in batch])
        end = start + sampling.max_new_tokens
        length = int(end.max())
        position = torch.arange(length)
        tokens = torch.stack([request.tokens(length, self._denoiser.mask_id) for request in batch])
        masked = torch.stack([request.masked(length, sampling.max_new_tokens) for request in batch])
        size, origin = block_rule(self._denoiser, sampling)
        block_ids = block_index(start, length, size, origin)
        first = block_ids.gather(1, start[:, None])
        rows = _Rows(
            row=torch.arange(len(batch)),
            tokens=tokens,
            masked=masked,
            due=torch.ones_like(masked) if count is None else block_ids < first + count,
            valid=position < end[:, None],
            canvas=(position >= start[:, None]) & (position < end[:, None]),
            step=torch.full_like(tokens, GIVEN),
            logp=torch.zeros(len(batch), 2, length),
            order=torch.zeros_like(tokens),
            confidence=torch.zeros(len(batch), sampling.max_new_tokens if self._whole else 0, length),
            block_ids=block_ids,
            key=torch.tensor([request.key for request in batch]),
            forward=torch.zeros(len(batch), dtype=torch.int64),
        )
        apart = (
            block_ids + length * torch.arange(len(batch))[:, None]
        )  # blocks of different rows have different numbers
        begun = torch.unique(apart[masked], return_counts=True)[1]
        for row, request in enumerate(batch):  # set-up, once per row
            if request.partial is not None:
                rows.restore(row, request.partial)
        for field in dataclasses.fields(rows):
            setattr(rows, field.name, getattr(rows, field.name).to(self._denoiser.device))
        return rows, Schedule(sampling, size, begun, self._denoiser.device)

    def _decode_full(
        self, rows: _Rows, batch: list[Request], sampling: Sampling, schedule: Schedule
    ) -> Iterator[tuple[int, Trajectory]]:
        position = torch.arange(rows.tokens.shape[1], device=rows.tokens.device).expand_as(rows.tokens)
        yield from self._retire(rows, ~rows.left.any(-1), batch, sampling)
        beyond = int(rows.block_ids.max()) + 1 if len(rows.row) else 0
        while len(rows.row):
            current = torch.where(rows.masked, rows.block_ids, beyond).amin(-1, keepdim=True)
            inside = rows.block_ids == current
            # Rows in the same state (samples of one prompt, at first) share a forward.
            same = [rows.tokens, rows.valid, *([rows.given] if sampling.cfg_scale else [])]
            distinct, copy = torch.unique(torch.cat(same, dim=1), dim=0, return_inverse=True)
            tokens, valid, *given = distinct.split(rows.tokens.shape[1], dim=1)
            masked, valid = tokens == self._denoiser.mask_id, valid.bool()
            states = [self._denoiser.hidden_states(tokens, masked, valid, None)]
            states += [self._denoiser.hidden_states(tokens, masked | g.bool(), valid, None) for g in given]
            place = position[: len(rows.row)]
            self._commit(rows, place, rows.masked & inside, rows.valid, inside, states, copy, sampling, schedule)
            complete = ~(rows.masked & inside).any(-1)
            done = complete & (self._ended(rows, inside) | ~rows.left.any(-1))
            yield from self._retire(rows, done, batch, sampling)

    def _decode_blocks(
        self, rows: _Rows, batch: list[Request], sampling: Sampling, schedule: Schedule
    ) -> Iterator[tuple[int, Trajectory]]:
        denoiser = self._denoiser
        size, origin = block_rule(denoiser, sampling)
        device = rows.tokens.device
        yield from self._retire(rows, ~rows.left.any(-1), batch, sampling)
        if not len(rows.row):
            return
        prompt_length = torch.tensor([len(batch[row].prompt.token_ids) for row in rows.row.tolist()], device=device)
        begin = prompt_length if origin == "response" else prompt_length // size * size
        first = rows.block_ids.gather(1, prompt_length[:, None]).squeeze(1)
        current = rows.block_ids.masked_fill(~rows.masked, int(rows.block_ids.max())).amin(-1)
        begin = begin + (current - first) * size  # what is known before it is context, as the prompt is
        longest = int(begin.max())
        clean = torch.arange(longest, device=device) < begin[:, None]
        cache = denoiser.prefill(rows.tokens[:, :longest], clean, rows.block_ids[:, :longest], self._cache_type)
        while True:
            position = begin[:, None] + torch.arange(size, device=device)
            room = position < rows.tokens.shape[1]
            place = position.clamp(max=rows.tokens.shape[1] - 1)  # a last window may stick out past the canvas
            valid = rows.valid.gather(1, place) & room
            while bool((active := rows.masked.gather(1, place) & valid).any()):
                window = torch.where(active, denoiser.mask_id, rows.tokens.gather(1, place))
                states = denoiser.extend(cache, window, position, valid, commit=False)
                copy = torch.arange(len(states), device=device)
                self._commit(rows, place, active, valid, valid, [states], copy, sampling, schedule)
            inside = rows.block_ids == rows.block_ids.gather(1, place[:, :1])
            done = self._ended(rows, inside) | ~rows.left.any(-1)
            stay = (~done).nonzero().flatten()
            yield from self._retire(rows, done, batch, sampling)
            if not len(stay):
                return
            if bool(done.any()):
                cache.keep_rows(stay)
                begin, position, place, valid = begin[stay], position[stay], place[stay], valid[stay]
            denoiser.extend(cache, rows.tokens.gather(1, place), position, valid, commit=True)
            begin = begin + size

    def _commit(
        self,
        rows: _Rows,
        place: Tensor,
        active: Tensor,
        visible: Tensor,
        inside: Tensor,
        states: Sequence[Tensor],
        copy: Tensor,
        sampling: Sampling,
        schedule: Schedule,
    ) -> None:
        """Propose a token at every active position, let the strategy choose, write what it chose.

        Args:
            rows: changed in place.
            place: (N, W) positions of the window in the row.
            active: (N, W) bool; masked positions of the active block.
            visible: (N, W) bool; positions of the window that belong to the row.
            inside: (N, W) bool; positions of the window that belong to the active block.
            states: (u, W, D) of distinct inputs; with cfg_scale, also those behind a masked prompt.
            copy: (N,) int64; the state of each row.
            sampling: how to draw.
            schedule: how many to commit.
        """
        context = rows.canvas.gather(1, place) & visible
        masked = rows.masked.gather(1, place) & context
        wanted = masked if self._whole else active
        row, column = wanted.nonzero(as_tuple=True)
        position = place[row, column]
        key, forward = rows.key[row], rows.forward[row]
        noise = uniform(key, forward, position, TOKEN_NOISE)
        size = max(1, self._chunk_elements // self._denoiser.vocab_size)
        token = torch.zeros(active.shape, dtype=torch.int64, device=active.device)
        logp, drawn, confidence, entropy, margin = torch.zeros(5, *active.shape, device=active.device).unbind()
        for begin in range(0, len(row), size):
            part = slice(begin, begin + size)
            at = (row[part], column[part])
            logits, *unconditional = (self._denoiser.unembed(s[copy[at[0]], at[1]]) for s in states)
            behind = unconditional[0] if unconditional else None
            p = propose(logits, sampling, noise[part], mask_id=self._denoiser.mask_id, unconditional=behind)
            token[at], logp[at], drawn[at], confidence[at] = p.token, p.logp, p.sampled_logp, p.confidence
            entropy[at], margin[at] = p.entropy, p.margin
        candidates = Candidates(
            eligible=active,
            token=token,
            logp=confidence.masked_fill(~wanted, float("-inf")),
            entropy=entropy,
            margin=margin,
            noise=uniform(rows.key[:, None], rows.forward[:, None], place, POSITION_NOISE),
            count=schedule.count(
                active, inside, rows.step.gather(1, place), key=rows.key, forward=rows.forward, position=place
            ),
            context=context,
            masked=masked,
            time=rows.forward.float() / sampling.max_new_tokens,
        )
        if self._whole:
            row, column = masked.nonzero(as_tuple=True)
            rows.confidence[row, rows.forward[row], place[row, column]] = confidence[row, column].exp()
        order = choose(self._strategy, candidates)
        row, column = order.nonzero(as_tuple=True)
        at = (row, place[row, column])
        rows.order[at] = order[row, column]
        rows.tokens[at] = token[row, column]
        rows.logp[at[0], :, at[1]] = torch.stack([logp[row, column], drawn[row, column]], dim=-1)
        rows.step[at] = rows.forward[row]
        rows.masked[at] = False
        rows.forward += active.any(-1)

    def _ended(self, rows: _Rows, inside: Tensor) -> Tensor:
        """(N,) bool: an end token was generated inside the given positions."""
        return (inside & (rows.step != GIVEN) & torch.isin(rows.tokens, self._end_ids)).any(-1)

    def _retire(
        self, rows: _Rows, done: Tensor, batch: list[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Trajectory]]:
        """Hand out the finished rows and drop them from the state."""
        finished = done.nonzero().flatten().tolist()
        if not finished:
            return
        forwards, order = rows.forward.tolist(), rows.row.tolist()
        tokens, step, logp = rows.tokens[done].cpu(), rows.step[done].cpu(), rows.logp[done].cpu()
        choice, confidence = rows.order[done].cpu(), rows.confidence[done].cpu()
        rows.keep((~done).nonzero().flatten())
        for place, row in enumerate(finished):
            request = batch[order[row]]
            yield (
                request.index,
                trajectory(
                    request,
                    sampling,
                    tokens=tokens[place],
                    unmask_step=step[place],
                    logp=logp[place],
                    order=choice[place],
                    confidence=confidence[place] if self._whole else None,
                    num_forwards=forwards[row],
                    denoiser=self._denoiser,
                    weights=self.weights,
                ),
            )


class NativeEngine(TorchEngine):
    """Batches of rows over a denoiser of ours."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        max_batch_tokens: int = 1 << 16  # padded tokens per forward at most
        cache: str = "block"  # of block-causal families: an entry point of dllm_rl.caches, or "package.module:Name"

        def __post_init__(self) -> None:
            ranges.at_least_one(max_batch_tokens=self.max_batch_tokens)
            plugin_class("caches", self.cache)

    config: Config

    @override
    def sampler(self, strategy: UnmaskingStrategy, *, keep_confidence: bool = False) -> NativeSampler:
        return NativeSampler(
            self.denoiser,
            strategy,
            weights=self.weights,
            max_batch_tokens=self.config.max_batch_tokens,
            keep_confidence=keep_confidence,
            cache_type=plugin_class("caches", self.config.cache),
        )
