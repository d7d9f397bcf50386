"""The native engine equals the oracle, and a row never depends on its neighbours."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl import registry
from dllm_rl.diffusion import likelihood, masking
from dllm_rl.diffusion.layout import block_index
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import GIVEN, Prompt, RolloutBatch, Sampling, Trajectory, WeightsVersion
from rollouts.native import NativeSampler
from rollouts.reference import ReferenceSampler

ATOL_F32 = 1e-5
WEIGHTS = WeightsVersion(step=0, digest="x")
MODELS = {
    "tiny": {},
    "llada": {},
    "dream": {},
    "sdar, blocks from the response": {"family": "sdar", "block_size": 4, "block_origin": "response"},
    "sdar, blocks from the sequence": {"family": "sdar", "block_size": 4, "block_origin": "sequence"},
}
STRATEGIES = ("low_confidence", "random", "confidence_threshold", "entropy", "margin", "left_to_right")
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=10, temperature=0.0),
    "greedy, 3 a step, blocks of 5": Sampling(max_new_tokens=10, temperature=0.0, tokens_per_step=3, block_size=5),
    "sampled": Sampling(max_new_tokens=10, temperature=1.0, tokens_per_step=2),
    "uniform": Sampling(max_new_tokens=12, temperature=1.0, steps=9, schedule="uniform"),
    "timesteps, filtered confidence": Sampling(
        max_new_tokens=10, temperature=0.7, steps=5, schedule="timesteps", top_k=4, top_p=0.9, confidence="sampled"
    ),
    "ancestral": Sampling(max_new_tokens=10, steps=5, schedule="ancestral", suppress_tokens=(3,), defer_tokens=(4, 5)),
    "sampled, top-k and top-p": Sampling(max_new_tokens=10, temperature=0.7, top_k=6, top_p=0.9, tokens_per_step=2),
}


def build(tiny_denoiser, name, **more):
    options = dict(MODELS[name])
    return tiny_denoiser(options.pop("family", name), **options, **more)


def prompts_of(denoiser, lengths=(3, 6, 1, 5, 8), injected=(), every=1) -> list[Prompt]:
    """Ragged prompts; every so many of them have the injected tokens."""
    return [
        Prompt(
            uid=f"p{row}",
            token_ids=tuple(3 + (row * 7 + i * 5) % (denoiser.vocab_size - 3) for i in range(length)),
            text="",
            answer="",
            task="t",
            injected=dict(injected) if row % every == 0 else {},
        )
        for row, length in enumerate(lengths)
    ]


def strategy(name, temperature=0.0):
    cls = registry.load("strategies", name)
    options = {"threshold": 0.5} if name == "confidence_threshold" else {"temperature": temperature}
    return cls(cls.Config(**options) if name in ("confidence_threshold", "entropy", "margin") else cls.Config())


def fit(denoiser, sampling):
    return dataclasses.replace(sampling, block_size=None) if denoiser.block_size is not None else sampling


def same(a: Trajectory, b: Trajectory) -> None:
    assert (a.prompt_uid, a.sample, a.finish, a.num_forwards) == (b.prompt_uid, b.sample, b.finish, b.num_forwards)
    assert (a.prompt_length, a.completion_length) == (b.prompt_length, b.completion_length)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.unmask_step, b.unmask_step)
    assert torch.equal(a.events, b.events)
    torch.testing.assert_close(a.behaviour_logp, b.behaviour_logp, atol=ATOL_F32, rtol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("model", MODELS)
def test_native_equals_the_oracle(tiny_denoiser, model, sampling):
    denoiser = build(tiny_denoiser, model)
    settings = fit(denoiser, SAMPLINGS[sampling])
    for name in STRATEGIES:
        oracle = ReferenceSampler(denoiser, strategy(name), weights=WEIGHTS)
        native = NativeSampler(denoiser, strategy(name), weights=WEIGHTS)
        prompts = prompts_of(denoiser, injected=((0, 5), (4, 7)), every=2)
        for a, b in zip(
            native.generate(prompts, settings, seed=3), oracle.generate(prompts, settings, seed=3), strict=True
        ):
            same(a, b)


def ending(tiny_denoiser, model):
    """A model that samples one of two end tokens now and then: the tokens nearest to 4% of its samples each."""
    denoiser = build(tiny_denoiser, model)
    engine = NativeSampler(denoiser, strategy("random"), weights=WEIGHTS)
    rows = engine.generate(prompts_of(denoiser), BLOCKS_OF_FOUR, seed=0, samples_per_prompt=4)
    drawn = torch.cat([t.events[:, 2] for t in rows])
    denoiser.end_ids = tuple((drawn.bincount() / len(drawn) - 0.04).abs().argsort()[:2].tolist())
    denoiser.eos_id = denoiser.end_ids[0]
    return denoiser


BLOCKS_OF_FOUR = Sampling(max_new_tokens=16, temperature=1.0, tokens_per_step=2, block_size=4)


@pytest.mark.parametrize("name", ["low_confidence", "confidence_threshold"])
@pytest.mark.parametrize("model", MODELS)
def test_rows_end_at_eos_like_the_oracle(tiny_denoiser, model, name):
    denoiser = ending(tiny_denoiser, model)
    prompts = prompts_of(denoiser)
    # An EOS in the prompt is no end of the completion, not even in the block that the completion starts in.
    prompts[1] = dataclasses.replace(prompts[1], token_ids=(3, denoiser.eos_id, 4, 5, 6, denoiser.end_ids[1]))
    got, want = (
        engine(denoiser, strategy(name), weights=WEIGHTS).generate(
            prompts, BLOCKS_OF_FOUR, seed=1, samples_per_prompt=4
        )
        for engine in (NativeSampler, ReferenceSampler)
    )
    assert [(t.prompt_uid, t.sample) for t in got] == [(p.uid, s) for p in prompts for s in range(4)]
    for a, b in zip(got, want, strict=True):
        same(a, b)
    ended = [t for t in got if t.finish == "eos"]
    early = [t for t in ended if int(t.unmask_step.max()) == t.num_forwards]
    assert len(early) > 3 and len({t.completion_length for t in got}) > 3, "the test needs rows that end early"
    ends = torch.tensor(denoiser.end_ids)
    assert {int(t.tokens[t.prompt_length + t.completion_length - 1]) for t in ended} == set(denoiser.end_ids)
    for t in ended:
        end = t.prompt_length + t.completion_length
        assert not torch.isin(t.tokens[t.prompt_length : end - 1], ends).any()
        never = t.unmask_step == t.num_forwards
        assert (t.tokens[never] == denoiser.eos_id).all() and not never[:end].any()


class Recorded:
    """A denoiser that counts what it is asked for."""

    def __init__(self, denoiser):
        self._denoiser = denoiser
        self.forwards, self.commits, self.unembedded = [], [], []

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def hidden_states(self, tokens, mask, valid, block_ids=None):
        self.forwards.append(len(tokens))
        return self._denoiser.hidden_states(tokens, mask, valid, block_ids)

    def extend(self, cache, tokens, positions, valid, *, commit):
        (self.commits if commit else self.forwards).append(len(tokens))
        return self._denoiser.extend(cache, tokens, positions, valid, commit=commit)

    def unembed(self, rows):
        self.unembedded.append(len(rows))
        return self._denoiser.unembed(rows)


@pytest.mark.parametrize("model", MODELS)
def test_no_work_is_done_that_no_row_needs(tiny_denoiser, model):
    """Finished rows leave, equal states are computed once, only hidden positions of the active block are unembedded."""
    denoiser = Recorded(ending(tiny_denoiser, model))
    chunk = 3 * denoiser.vocab_size
    engine = NativeSampler(denoiser, strategy("confidence_threshold"), weights=WEIGHTS, chunk_elements=chunk)
    rows = engine.generate(prompts_of(denoiser), BLOCKS_OF_FOUR, seed=2, samples_per_prompt=8)
    assert len({t.num_forwards for t in rows}) > 1, "the test needs rows that end at different times"
    needed, per_block = 0, []
    for t in rows:
        length, start = len(t.tokens), torch.tensor([t.prompt_length])
        size, origin = denoiser.block_size or 4, denoiser.block_origin
        block = block_index(start, length, size, origin)[0]
        decoded = (t.unmask_step >= 0) & (t.unmask_step < t.num_forwards)
        for forward in range(t.num_forwards):
            active = block == block[(t.unmask_step == forward).nonzero()[0]]
            needed += int((active & decoded & (t.unmask_step >= forward)).sum())
        per_block.append([int(t.unmask_step[decoded & (block == b)].unique().numel()) for b in block[decoded].unique()])
    assert sum(denoiser.unembedded) == needed and max(denoiser.unembedded) <= 3
    if denoiser.block_size is None:
        states: list[set[tuple[int, ...]]] = [set() for _ in range(max(t.num_forwards for t in rows))]
        for t in rows:
            for forward in range(t.num_forwards):
                states[forward].add(tuple(t.tokens.masked_fill(t.unmask_step >= forward, -1).tolist()))
        assert denoiser.forwards == [len(distinct) for distinct in states]
        assert denoiser.forwards[0] == 5, "the samples of a prompt share their first forward"
        return
    left = [sum(len(p) > k for p in per_block) for k in range(max(map(len, per_block)))]
    slowest = [max(p[k] for p in per_block if len(p) > k) for k in range(len(left))]
    assert denoiser.forwards == [n for n, times in zip(left, slowest, strict=True) for _ in range(times)]
    assert denoiser.commits == left[1:], "a block is committed once, by the rows that go on"


@pytest.mark.parametrize("limit", [10, 59, 10_000])
def test_a_forward_holds_at_most_max_batch_tokens(tiny_denoiser, limit):
    denoiser = Recorded(build(tiny_denoiser, "tiny"))
    engine = NativeSampler(denoiser, strategy("low_confidence"), weights=WEIGHTS, max_batch_tokens=limit)
    settings = Sampling(max_new_tokens=10, temperature=1.0, tokens_per_step=5)
    prompts = [
        dataclasses.replace(prompts_of(denoiser)[0], uid=str(i), token_ids=(3 + i % 4, 3 + i // 4)) for i in range(12)
    ]
    engine.generate(prompts, settings, seed=0)
    per_forward = max(1, min(12, limit // 12))  # rows of 12 tokens; one row may exceed the limit
    assert denoiser.forwards == [per_forward] * (2 * 12 // per_forward)


@pytest.mark.parametrize("model", MODELS)
def test_a_row_does_not_depend_on_its_batch(tiny_denoiser, model):
    denoiser = build(tiny_denoiser, model)
    settings = fit(denoiser, SAMPLINGS["sampled"])
    prompts = prompts_of(denoiser)
    engine = NativeSampler(denoiser, strategy("low_confidence"), weights=WEIGHTS)
    want = {(t.prompt_uid, t.sample): t for t in engine.generate(prompts, settings, seed=5, samples_per_prompt=2)}
    alone = [t for p in prompts for t in engine.generate([p], settings, seed=5, samples_per_prompt=2)]
    mixed = engine.generate([prompts[3], prompts[0], prompts[4]], settings, seed=5)
    narrow = NativeSampler(denoiser, strategy("low_confidence"), weights=WEIGHTS, max_batch_tokens=40)
    for t in [*alone, *mixed, *narrow.generate(prompts, settings, seed=5, samples_per_prompt=2)]:
        same(t, want[t.prompt_uid, t.sample])
    other = engine.generate(prompts, settings, seed=6)
    assert any(not torch.equal(t.tokens, want[t.prompt_uid, t.sample].tokens) for t in other)


FILTERED = {"temperature": 0.6, "top_k": 4, "confidence": "sampled", "schedule": "timesteps"}


@pytest.mark.parametrize("engine", [NativeSampler, ReferenceSampler])
@pytest.mark.parametrize(
    ("model", "more"), [*((m, {}) for m in MODELS), *((m, FILTERED) for m in MODELS), ("llada", {"cfg_scale": 2.0})]
)
def test_trajectories_replay_to_their_own_log_probabilities(tiny_denoiser, model, more, engine):
    """tokens + unmask_step determine every state: the learner's estimator gives back what the engine saw."""
    denoiser = build(tiny_denoiser, model)
    settings = fit(denoiser, Sampling(max_new_tokens=12, tokens_per_step=3, block_size=4, **more))
    prompts = prompts_of(denoiser, injected=((2, 6),))
    for t in engine(denoiser, strategy("random"), weights=WEIGHTS).generate(prompts, settings, seed=2):
        length = len(t.tokens)
        assert t.tokens[t.prompt_length + 2] == 6 and t.unmask_step[t.prompt_length + 2] == GIVEN
        completion = (t.unmask_step >= 0) & (torch.arange(length) < t.prompt_length + t.completion_length)
        start = torch.tensor([t.prompt_length])
        blocks = None
        if denoiser.block_size is not None:
            blocks = block_index(start, length, denoiser.block_size, denoiser.block_origin)
        one = torch.zeros(1, dtype=torch.int64)
        batch = RolloutBatch(
            tokens=t.tokens[None],
            valid=torch.ones(1, length, dtype=torch.bool),
            completion=completion[None],
            hint=torch.zeros(1, length, dtype=torch.bool),
            tail=torch.zeros(1, length, dtype=torch.bool),
            unmask_step=t.unmask_step[None],
            behaviour_logp=t.behaviour_logp[None],
            prompt_length=start,
            group=one,
            num_forwards=one,
            weights_step=t.weights_step[None],
            block_ids=blocks,
            exact=True,
        )
        masks = masking.along_trajectory(batch.unmask_step, batch.completion, block_ids=blocks)
        replayed = likelihood.estimate(denoiser, batch, masks).token_logp[0]
        torch.testing.assert_close(replayed, torch.where(completion, t.behaviour_logp, 0.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_every_position_is_committed_once_in_order(tiny_denoiser, model):
    denoiser = build(tiny_denoiser, model)
    settings = fit(denoiser, SAMPLINGS["sampled"])
    for t in NativeSampler(denoiser, strategy("margin"), weights=WEIGHTS).generate(
        prompts_of(denoiser), settings, seed=0
    ):
        forwards, positions, tokens = t.events.T
        assert (forwards.diff() >= 0).all() and len(positions.unique()) == len(positions)
        assert torch.equal(t.unmask_step[positions], forwards) and torch.equal(t.tokens[positions], tokens)
        decoded = (t.unmask_step >= 0) & (t.unmask_step < t.num_forwards)
        assert torch.equal(positions.sort().values, decoded.nonzero().flatten())
        assert (t.unmask_step[: t.prompt_length] == GIVEN).all()
        assert denoiser.mask_id not in t.tokens
        per_forward = torch.bincount(forwards, minlength=t.num_forwards)
        assert (per_forward >= 1).all() and (per_forward <= 2).all()


def test_training_mode_is_left_as_it_was(tiny_denoiser):
    denoiser = tiny_denoiser()
    for training in (True, False):
        denoiser.module.train(training)
        for engine in (NativeSampler, ReferenceSampler):
            engine(denoiser, strategy("random"), weights=WEIGHTS).generate(
                prompts_of(denoiser), SAMPLINGS["greedy"], seed=0
            )
            assert denoiser.module.training is training
            with pytest.raises(ValueError, match="NothingSelected selected no position"):
                engine(denoiser, NothingSelected(None), weights=WEIGHTS).generate(
                    prompts_of(denoiser), SAMPLINGS["greedy"], seed=0
                )
            assert denoiser.module.training is training, "an error left the module in another mode"


class NothingSelected(UnmaskingStrategy):
    def select(self, candidates):
        return torch.zeros_like(candidates.eligible)


class VisibleSelected(UnmaskingStrategy):
    def select(self, candidates):
        return torch.ones_like(candidates.eligible)


@pytest.mark.parametrize("engine", [NativeSampler, ReferenceSampler])
@pytest.mark.parametrize("model", ["tiny", "sdar, blocks from the sequence"])
def test_a_strategy_that_breaks_its_contract_is_named(tiny_denoiser, engine, model):
    denoiser = build(tiny_denoiser, model)
    for cls, words in (
        (NothingSelected, "no position of a row that has eligible ones"),
        (VisibleSelected, "a position that is not eligible"),
    ):
        with pytest.raises(ValueError, match=f"strategy {cls.__name__} selected {words}"):
            engine(denoiser, cls(None), weights=WEIGHTS).generate(
                prompts_of(denoiser), Sampling(max_new_tokens=8), seed=0
            )


def test_a_fully_injected_canvas_needs_no_forward(tiny_denoiser):
    for model in ("tiny", "sdar, blocks from the sequence"):
        denoiser = build(tiny_denoiser, model)
        prompts = prompts_of(denoiser, injected=tuple((i, 5) for i in range(10)))
        for engine in (NativeSampler, ReferenceSampler):
            for t in engine(denoiser, strategy("random"), weights=WEIGHTS).generate(
                prompts, Sampling(max_new_tokens=10), seed=0
            ):
                assert t.num_forwards == 0 and (t.tokens[t.prompt_length :] == 5).all() and len(t.events) == 0


@pytest.mark.parametrize(
    ("model", "sampling", "prompt", "words"),
    [
        ("tiny", Sampling(max_new_tokens=127), {}, "prompt 'p' has 2 tokens; with sampling.max_new_tokens = 127"),
        ("tiny", Sampling(max_new_tokens=4), {"token_ids": ()}, "prompt 'p' is empty"),
        ("tiny", Sampling(max_new_tokens=4), {"injected": {4: 5}}, "injected offset 4 is outside"),
        ("sdar, blocks from the response", Sampling(max_new_tokens=6, block_size=3), {}, "decodes blocks of 4"),
        (
            "sdar, blocks from the response",
            Sampling(max_new_tokens=8, cfg_scale=1.0),
            {},
            "set sampling.cfg_scale to 0",
        ),
        ("dream", Sampling(max_new_tokens=8, cfg_scale=1.0), {}, "set sampling.cfg_scale to 0"),
        ("sdar, blocks from the response", Sampling(max_new_tokens=8, steps=3), {}, "steps = 3 do not divide"),
    ],
)
def test_what_cannot_be_decoded_is_refused(tiny_denoiser, model, sampling, prompt, words):
    denoiser = build(tiny_denoiser, model)
    one = Prompt(**({"uid": "p", "token_ids": (3, 4), "text": "", "answer": "", "task": "t"} | prompt))
    for engine in (NativeSampler, ReferenceSampler):
        with pytest.raises(ValueError, match=words):
            engine(denoiser, strategy("random"), weights=WEIGHTS).generate([one], sampling, seed=0)
