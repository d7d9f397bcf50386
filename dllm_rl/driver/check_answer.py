"""Whether what an engine returned answers what it was asked: every call is compared with its request.

Advantages and log-ratios are only as true as the rows that they are computed from, and a row that belongs to another
prompt trains the model on noise without any other sign. All rows of a call are looked at together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_rl import registry
from dllm_rl.config.plugins import plugin_class
from dllm_rl.diffusion.layout import block_index, block_rule
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.protocols.engine import TRAIN, Capabilities, Role
from dllm_rl.types import GIVEN, Prompt, Sampling, Trajectory, WeightsVersion

LOGP_TOLERANCE = 1e-3  # nats above 0; a float32 log-softmax of logits up to 1,000 rounds by less than a tenth of it
_ROW = ("tokens", "unmask_step", "behaviour_logp", "weights_step", "order", "sampled_logp")  # fields of shape (L,)
_FLOATS = ("behaviour_logp", "sampled_logp", "confidence")
_OPTIONAL = ("order", "sampled_logp", "confidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A call of an engine.

    Attributes:
        prompts: to complete.
        samples_per_prompt: rows of each.
        sampling: how to decode.
        weights: that the engine holds.
        partial: trajectories to go on with, or None.
        max_blocks: decoding blocks after which rows pause, or None.
        role: which strategy decodes.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    weights: WeightsVersion
    samples_per_prompt: int = 1
    partial: Sequence[Trajectory] | None = None
    max_blocks: int | None = None
    role: Role = TRAIN


class AnswerCheck:
    """Compares the answers of an engine with what it was asked."""

    def __init__(
        self,
        denoiser: Denoiser,
        capabilities: Capabilities,
        strategies: Mapping[str, str],
        *,
        engine: str = "native",
    ) -> None:
        """Hold what an answer must fit.

        Args:
            denoiser: for its blocks and token ids; weights are not looked at.
            capabilities: of the engine: nothing is asked of fields that it does not fill.
            strategies: role -> name of its unmasking strategy.
            engine: its name, for messages.
        """
        self._denoiser, self._can, self._strategies = denoiser, capabilities, strategies
        self._engine = engine

    def __call__(self, asked: Asked, answer: Sequence[Trajectory]) -> str:
        """What is wrong with an answer, in one line; "" if nothing is.

        Args:
            asked: the call.
            answer: its rows; on the CPU.
        """
        rows = [(prompt, sample) for prompt in asked.prompts for sample in range(asked.samples_per_prompt)]
        if len(answer) != len(rows):
            return f"{len(answer)} rows came back, {len(rows)} were asked for"
        for (prompt, sample), row in zip(rows, answer, strict=True):
            if problem := self._misfit(prompt, sample, row, asked.sampling):
                return f"prompt '{prompt.uid}', sample {sample}: {problem}"
        checks = self._values(asked, [prompt for prompt, _ in rows], answer) if answer else ()
        for wrong, text in checks:
            if bool(wrong.any()):
                row, *position = wrong.nonzero()[0].tolist()
                prompt, sample = rows[row]
                where = f" (position {position[0]})" if position else ""
                return f"prompt '{prompt.uid}', sample {sample}: {text}{where}"
        return ""

    def error(self, problem: str) -> RunStopped | UserError:
        """What ends a run whose engine answers wrongly again after it was built anew."""
        return engine_error(self._engine, f"answers wrongly, also after it was built anew: {problem}")

    def _misfit(self, prompt: Prompt, sample: int, row: Trajectory, sampling: Sampling) -> str:
        """Whose row it is, and the shapes and dtypes of its fields."""
        start, canvas = len(prompt.token_ids), sampling.max_new_tokens
        if (row.prompt_uid, row.sample) != (prompt.uid, sample):
            return f"the row of prompt '{row.prompt_uid}', sample {row.sample} came in its place"
        if row.prompt_length != start:
            return f"prompt_length is {row.prompt_length}, the prompt has {start} tokens"
        if not 1 <= row.completion_length <= canvas:
            return f"completion_length is {row.completion_length}, the canvas has {canvas} tokens"
        if row.finish not in ("eos", "length", "paused") or row.num_forwards < 0:
            return f"finish is {row.finish!r} and num_forwards {row.num_forwards}"
        length, forwards = start + canvas, row.num_forwards
        shapes = dict.fromkeys(_ROW, (length,)) | {"events": (len(row.events), 3), "confidence": (forwards, length)}
        for name, shape in shapes.items():
            value = getattr(row, name)
            if value is None and name in _OPTIONAL:
                continue
            dtype = torch.float32 if name in _FLOATS else torch.int64
            if value is None or tuple(value.shape) != shape or value.dtype != dtype:
                found = "None" if value is None else f"{tuple(value.shape)} {value.dtype}"
                return f"{name} is {found}, expected {shape} {dtype}"
        return ""

    def _values(
        self, asked: Asked, prompts: Sequence[Prompt], answer: Sequence[Trajectory]
    ) -> Iterator[tuple[Tensor, str]]:
        """(N,) or (N, L) bool, True where something is wrong, and what that is; later ones rely on earlier ones."""
        can, model, sampling = self._can, self._denoiser, asked.sampling

        def padded(name: str, fill: float) -> Tensor:
            return pad_sequence([getattr(row, name) for row in answer], batch_first=True, padding_value=fill)

        tokens, step = padded("tokens", model.pad_id), padded("unmask_step", GIVEN)
        start = torch.tensor([len(prompt.token_ids) for prompt in prompts])[:, None]
        forwards = torch.tensor([row.num_forwards for row in answer])[:, None]
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        canvas = (position >= start) & (position < start + sampling.max_new_tokens)
        given, known = _given(prompts, tokens)
        inside = canvas & ~given  # the positions to be decoded
        yield given & (tokens != known), "it holds other tokens of its prompt than were sent"
        revises = can.step_maps and self._revises(asked.role)
        decoded = inside
        if can.step_maps:
            yield (step != GIVEN) != inside, "unmask_step does not tell generated positions from given ones"
            yield inside & ((step < 0) | (step > forwards)), "unmask_step is outside its forwards"
            decoded = inside & (step < forwards)
        yield decoded & (tokens == model.mask_id), "a mask token is left"
        yield decoded & ((tokens < 0) | (tokens >= model.vocab_size)), "a token is not in the vocabulary"
        if sampling.suppress_tokens:
            yield decoded & torch.isin(tokens, torch.tensor(sampling.suppress_tokens)), "a suppressed token came"
        yield inside & ~decoded & (tokens != model.eos_id), "a position that was never decoded holds another than EOS"
        yield from self._log_probabilities(answer, padded, decoded, sampling)
        ends = decoded & torch.isin(tokens, torch.tensor(model.end_ids))
        beyond = tokens.shape[1]
        first = torch.where(ends, position, beyond).amin(1, keepdim=True)
        ended, last = first[:, 0] < beyond, start[:, 0] + sampling.max_new_tokens
        length = torch.tensor([row.completion_length for row in answer])
        yield start[:, 0] + length != torch.where(ended, first[:, 0] + 1, last), "its length is not up to its end token"
        paused = torch.tensor([row.finish == "paused" for row in answer])
        yield torch.tensor([row.finish == "eos" for row in answer]) != ended, "finish contradicts its end tokens"
        if can.step_maps:
            size, origin = block_rule(model, sampling)
            block = block_index(start[:, 0], tokens.shape[1], size, origin)
            never, opening = inside & ~decoded, block.gather(1, start)
            closed = block.gather(1, first.clamp(max=beyond - 1))
            limit = torch.full_like(opening, beyond) if asked.max_blocks is None else opening + asked.max_blocks - 1
            limit = torch.where(ended[:, None], closed, limit)
            yield never & (block <= limit), "a position is left out, neither decoded nor behind the end of the row"
            yield paused != (never.any(1) & ~ended), "finish does not say whether the row is paused"
            if not revises:
                yield from _events(answer, tokens, step, decoded, forwards[:, 0])
                # A block-causal learner replays a block behind clean earlier ones: those must have been finished.
                late = _out_of_order(block - opening, step, decoded, strict=model.block_size is not None)
                yield late, "it decodes a block before those ahead of it are done"
        yield from _versions(asked, answer, padded("weights_step", GIVEN), decoded if can.step_maps else None)
        if asked.partial is not None and can.step_maps and not revises:
            yield from _continued(asked.partial, tokens, step)

    def _log_probabilities(
        self, answer: Sequence[Trajectory], padded: Callable[..., Tensor], decoded: Tensor, sampling: Sampling
    ) -> Iterator[tuple[Tensor, str]]:
        names = ["behaviour_logp"] if self._can.logp else []
        if self._can.sampled_logp and not sampling.plain:
            yield torch.tensor([row.sampled_logp is None for row in answer]), "sampled_logp is missing"
            names.append("sampled_logp")
        for name in names:
            logp = padded(name, 0.0)
            yield ~logp.isfinite(), f"{name} is not finite"
            yield logp > LOGP_TOLERANCE, f"{name} is above 0"
            yield ~decoded & (logp != 0), f"{name} is not 0 where nothing was generated"
        for number, row in enumerate(answer):
            if row.confidence is not None:  # (T, L) each: not copied into one tensor
                wrong = torch.zeros(len(answer), dtype=torch.bool)
                wrong[number] = not bool(((row.confidence >= 0) & (row.confidence <= 1 + LOGP_TOLERANCE)).all())
                yield wrong, "confidence is no probability"

    def _revises(self, role: Role) -> bool:
        name = self._strategies.get(role, self._strategies[TRAIN]) if isinstance(role, str) else role["name"]
        return bool(plugin_class("strategies", name).revises)


def engine_error(name: str, problem: str) -> RunStopped | UserError:
    """What ends a run whose engine breaks its contract: a user can mend an engine of other people."""
    if registry.is_ours(registry.load("engines", name).__module__):
        return RunStopped(f"engine '{name}' {problem}; nothing was learned from it: go on with --resume and report it")
    return UserError(
        f"engine '{name}' {problem}; mend the plugin, 'dllm-rl check-plugin engines {name}' says which clause it breaks"
    )


def _given(prompts: Sequence[Prompt], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L) bool and int64: where prompt and injected tokens are, and which."""
    known = pad_sequence([torch.tensor(p.token_ids) for p in prompts], batch_first=True, padding_value=GIVEN)
    known = torch.nn.functional.pad(known, (0, tokens.shape[1] - known.shape[1]), value=GIVEN)
    places = [(row, len(p.token_ids) + i, token) for row, p in enumerate(prompts) for i, token in p.injected.items()]
    if places:
        row, column, token = torch.tensor(places).T
        known[row, column] = token
    return known != GIVEN, known


def _events(
    answer: Sequence[Trajectory], tokens: Tensor, step: Tensor, decoded: Tensor, forwards: Tensor
) -> Iterator[tuple[Tensor, str]]:
    """Events commit every decoded position once, forward by forward."""
    count = torch.tensor([len(row.events) for row in answer])
    yield count != decoded.sum(1), "events do not commit every generated position once"
    events = pad_sequence([row.events for row in answer], batch_first=True, padding_value=GIVEN)
    if not events.shape[1]:
        return
    forward, place, token = events.unbind(-1)
    there = torch.arange(events.shape[1]) < count[:, None]
    outside = there & ((place < 0) | (place >= tokens.shape[1]))
    yield outside.any(1), "events commit a position outside the row"
    place = place.clamp(min=0)
    times = torch.zeros_like(tokens).scatter_add_(1, place, there.long())
    yield times != decoded.long(), "events do not commit every generated position once"
    same = (step.gather(1, place) == forward) & (tokens.gather(1, place) == token)
    yield (there & ~same).any(1), "events contradict tokens or unmask_step"
    before = torch.cat([torch.full_like(forward[:, :1], -1), forward[:, :-1]], dim=1)
    jump = forward - before
    yield (there & ((jump < 0) | (jump > 1))).any(1), "events are not in the order of forwards, or a forward is missing"
    yield forward.masked_fill(~there, -1).amax(1) + 1 != forwards, "num_forwards is not the number of its forwards"


def _out_of_order(block: Tensor, step: Tensor, decoded: Tensor, *, strict: bool) -> Tensor:
    """(N,) bool: a position was committed before one of an earlier block, or with it. Blocks are numbered from 0."""
    block = block.masked_fill(~decoded, 0)
    shape, never = (len(step), int(block.max()) + 1), torch.iinfo(torch.int64).max
    latest = torch.full(shape, -1).scatter_reduce_(1, block, step.masked_fill(~decoded, -1), "amax")
    soonest = torch.full(shape, never).scatter_reduce_(1, block, step.masked_fill(~decoded, never), "amin")
    return (soonest[:, 1:] < latest.cummax(1).values[:, :-1] + strict).any(1)


def _versions(
    asked: Asked, answer: Sequence[Trajectory], weights_step: Tensor, decoded: Tensor | None
) -> Iterator[tuple[Tensor, str]]:
    """Rows name the weights that decoded them: the engine's, and before a pause those of then."""
    partial: Sequence[Trajectory | None] = asked.partial or [None] * len(answer)
    want = [asked.weights if old is None or old.finish == "paused" else old.weights for old in partial]
    others = [row.weights != version for row, version in zip(answer, want, strict=True)]
    found = next((row.weights for row, other in zip(answer, others, strict=True) if other), None)
    yield torch.tensor(others), f"it was decoded by {found}, the engine holds {asked.weights}"
    if decoded is None:
        return
    expected = torch.where(decoded, torch.tensor([w.step for w in want])[:, None], GIVEN)
    if asked.partial is not None:
        old = pad_sequence([row.weights_step for row in asked.partial], batch_first=True, padding_value=GIVEN)
        expected = torch.where(old != GIVEN, old, expected)
    yield weights_step != expected, "weights_step are not the steps of the weights that decoded it"


def _continued(partial: Sequence[Trajectory], tokens: Tensor, step: Tensor) -> Iterator[tuple[Tensor, str]]:
    """What was decoded before a pause stays."""
    old = pad_sequence([row.unmask_step for row in partial], batch_first=True, padding_value=GIVEN)
    said = pad_sequence([row.tokens for row in partial], batch_first=True, padding_value=GIVEN)
    forwards = torch.tensor([row.num_forwards for row in partial])[:, None]
    kept = (old != GIVEN) & (old < forwards)
    yield kept & ((tokens != said) | (step != old)), "what was decoded before its pause has changed"
