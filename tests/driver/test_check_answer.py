"""An answer that does not fit its request is named, asked for again once on a fresh engine, and ends the run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl.cluster.group import WorkerLost
from dllm_rl.cluster.local_group import LocalWorkerGroup
from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases
from dllm_rl.conformance.engines import GREEDY, NEWER, PROMPTS, SAMPLED, TEMPERED, WEIGHTS, oracle
from dllm_rl.driver.check_answer import LOGP_TOLERANCE, AnswerCheck, Asked
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.types import GIVEN
from dllm_rl.workers.engine_worker import EngineWorker
from rollouts.native import NativeEngine, NativeSampler

CAN = NativeEngine.capabilities(None)
STRATEGIES = {"train": "low_confidence"}
ENDS = (4, 7)  # digits of the tiny vocabulary that end a row here, so that some rows end early


def model(family="tiny"):
    made = cases.denoiser(family)
    made.end_ids, made.eos_id = (made.eos_id, *ENDS), made.eos_id
    return made


@pytest.fixture(scope="module")
def denoiser():
    return model()


@pytest.fixture(scope="module")
def answer(denoiser):
    """What the reference engine answers to ASKED: its first row fills the canvas, others end early."""
    for seed in range(50):
        rows = oracle(denoiser).generate(PROMPTS, TEMPERED, seed=seed, samples_per_prompt=2)
        if rows[0].finish == "length" and any(row.finish == "eos" for row in rows):
            return rows
    raise AssertionError("no such seed")


ASKED = Asked(prompts=PROMPTS, samples_per_prompt=2, sampling=TEMPERED, weights=WEIGHTS)


@pytest.mark.parametrize("family", ["tiny", "dream", "sdar"])
def test_right_answers_pass_with_every_strategy_and_pause(family):
    denoiser = model(family)
    for strategy in ("low_confidence", "random", "left_to_right", "confidence_threshold"):
        check = AnswerCheck(denoiser, CAN, {"train": strategy})
        made = build("strategies", strategy, {})
        for sampling in (GREEDY, SAMPLED, TEMPERED, dataclasses.replace(SAMPLED, schedule="timesteps", steps=4)):
            engine = NativeSampler(denoiser, made, weights=WEIGHTS, keep_confidence=True)
            rows = engine.generate(PROMPTS, sampling, seed=1, samples_per_prompt=2)
            asked = Asked(prompts=PROMPTS, samples_per_prompt=2, sampling=sampling, weights=WEIGHTS)
            assert check(asked, rows) == "", (strategy, sampling)
            begun = dataclasses.replace(asked, max_blocks=1)
            paused = engine.generate(PROMPTS, sampling, seed=1, samples_per_prompt=2, max_blocks=1)
            assert check(begun, paused) == "" and any(row.finish == "paused" for row in paused)
            assert "left out" in check(asked, paused), "a row that pauses unasked would be decoded for ever"
            engine.weights = NEWER
            rest = engine.generate(PROMPTS, sampling, seed=1, samples_per_prompt=2, partial=paused)
            assert check(dataclasses.replace(asked, weights=NEWER, partial=paused), rest) == ""


def changed(row, **fields):
    """The row with some fields replaced; a function of the old value, or the new one."""
    return dataclasses.replace(row, **{n: v(getattr(row, n).clone()) if callable(v) else v for n, v in fields.items()})


def at(index, value):
    """Writes a value at an index (a function of the old one, or the value)."""

    def write(tensor):
        tensor[index] = value(tensor[index]) if callable(value) else value
        return tensor

    return write


def one(**fields):
    return lambda rows: [changed(rows[0], **fields), *rows[1:]]


def completions_of_neighbours(rows):
    """Prompts stay; what was generated for them goes to the next one, with its lengths."""
    other = {"prompt_uid", "sample"}
    keep = [f.name for f in dataclasses.fields(rows[0]) if f.name in other]
    turned = rows[2:] + rows[:2]
    return [
        dataclasses.replace(b, **{name: getattr(a, name) for name in keep}) for a, b in zip(rows, turned, strict=True)
    ]


START = len(PROMPTS[0].token_ids)
GARBAGE = {
    "a row too few": (lambda rows: rows[:-1], "11 rows came back, 12 were asked for"),
    "rows of two prompts swapped": (lambda rows: [rows[2], rows[1], rows[0], *rows[3:]], "came in its place"),
    "samples swapped": (lambda rows: [rows[1], rows[0], *rows[2:]], "the row of prompt 'p0', sample 1 came"),
    "rows reversed": (lambda rows: rows[::-1], "the row of prompt 'p5', sample 1 came in its place"),
    "mixed rows under right names": (completions_of_neighbours, "prompt_length is 6, the prompt has 3 tokens"),
    "another prompt of that length": (one(tokens=at(0, lambda old: old + 1)), "other tokens of its prompt"),
    "an injected token generated over": (
        lambda rows: [*rows[:2], changed(rows[2], tokens=at(6 + 1, 9)), *rows[3:]],
        "other tokens of its prompt",
    ),
    "an injected token said to be generated": (
        lambda rows: [*rows[:2], changed(rows[2], unmask_step=at(6 + 1, 0)), *rows[3:]],
        "does not tell generated positions from given ones",
    ),
    "a canvas too long": (
        one(tokens=lambda t: torch.cat([t, t[-1:]])),
        "tokens is (12,) torch.int64, expected (11,) torch.int64",
    ),
    "tokens as floats": (one(tokens=lambda t: t.float()), "tokens is (11,) torch.float32"),
    "log-probs of the completion alone": (one(behaviour_logp=lambda t: t[START:]), "behaviour_logp is (8,)"),
    "log-probs in double": (one(behaviour_logp=lambda t: t.double()), "behaviour_logp is (11,) torch.float64"),
    "no log-probs": (one(behaviour_logp=None), "behaviour_logp is None"),
    "sampled log-probs of the wrong shape": (one(sampled_logp=lambda t: t[None]), "sampled_logp is (1, 11)"),
    "no sampled log-probs": (one(sampled_logp=None), "sampled_logp is missing"),
    "NaN": (one(behaviour_logp=at(START, float("nan"))), "behaviour_logp is not finite (position 3)"),
    "-inf": (one(sampled_logp=at(START, float("-inf"))), "sampled_logp is not finite"),
    "a probability above 1": (one(behaviour_logp=at(START, 0.5)), "behaviour_logp is above 0"),
    "log-probs on the prompt": (one(behaviour_logp=at(0, -1.0)), "not 0 where nothing was generated"),
    "a mask token left": (one(tokens=at(START, 1)), "a mask token is left (position 3)"),
    "a token out of the vocabulary": (one(tokens=at(START, 1 << 20)), "not in the vocabulary"),
    "a negative token": (one(tokens=at(START, -5)), "not in the vocabulary"),
    "an end that is not told": (one(finish="paused"), "finish"),
    "a wrong length": (one(completion_length=1), "its length is not up to its end token"),
    "an empty completion": (one(completion_length=0), "completion_length is 0"),
    "a length beyond the canvas": (one(completion_length=99), "completion_length is 99"),
    "more forwards than there were": (lambda rows: [changed(r, num_forwards=r.num_forwards + 1) for r in rows], "p0"),
    "a step beyond the forwards": (one(unmask_step=at(START, 99)), "outside its forwards"),
    "a negative step": (one(unmask_step=at(START, -7)), "outside its forwards"),
    "a position left out": (one(unmask_step=at(START, 4), num_forwards=4), "never decoded holds another than EOS"),
    "a position committed twice": (one(events=at(0, lambda old: torch.tensor([0, START + 7, 3]))), "events"),
    "an event outside the row": (one(events=at((0, 1), 99)), "outside the row"),
    "events out of order": (one(events=lambda t: t.flip(0)), "not in the order of forwards"),
    "events of other tokens": (one(events=at((0, 2), lambda old: old + 1)), "contradict tokens"),
    "no events": (one(events=lambda t: t[:0]), "do not commit every generated position once"),
    "the last block first": (
        one(
            unmask_step=lambda t: torch.where(t == GIVEN, t, (t + 2) % 4),
            events=lambda t: torch.cat([t[4:] - torch.tensor([2, 0, 0]), t[:4] + torch.tensor([2, 0, 0])]),
        ),
        "decodes a block before those ahead of it",
    ),
    "weights of another step": (one(weights=NEWER), "decoded by WeightsVersion(step=8"),
    "weights with another digest": (one(weights=dataclasses.replace(WEIGHTS, digest="?")), "digest='?'"),
    "tokens of other weights": (one(weights_step=at(START, 3)), "weights_step are not the steps"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_named(kind, denoiser, answer):
    spoil, words = GARBAGE[kind]
    check = AnswerCheck(denoiser, CAN, STRATEGIES)
    assert check(ASKED, answer) == ""
    found = check(ASKED, spoil(list(answer)))
    assert words in found and "\n" not in found, found


def test_rounding_is_no_garbage(denoiser, answer):
    check = AnswerCheck(denoiser, CAN, STRATEGIES)
    assert check(ASKED, [changed(r, behaviour_logp=at(r.prompt_length, LOGP_TOLERANCE / 2)) for r in answer]) == ""


def test_what_was_decoded_before_a_pause_stays(denoiser):
    engine, check = oracle(denoiser), AnswerCheck(denoiser, CAN, STRATEGIES)
    paused = engine.generate(PROMPTS, SAMPLED, seed=1, max_blocks=1)
    asked = Asked(prompts=PROMPTS, sampling=SAMPLED, weights=WEIGHTS, partial=paused)
    assert check(asked, engine.generate(PROMPTS, SAMPLED, seed=1, partial=paused)) == ""
    assert "before its pause has changed" in check(asked, engine.generate(PROMPTS, SAMPLED, seed=2))


def test_nothing_is_asked_of_fields_that_an_engine_does_not_fill(denoiser, answer):
    can = dataclasses.replace(CAN, step_maps=False, logp=False, sampled_logp=False)
    zero = torch.zeros_like
    bare = [
        changed(r, unmask_step=zero, behaviour_logp=zero, events=lambda t: t[:0], sampled_logp=None) for r in answer
    ]
    assert AnswerCheck(denoiser, can, STRATEGIES)(ASKED, bare) == ""
    assert AnswerCheck(denoiser, CAN, STRATEGIES)(ASKED, bare) != ""


class Mixes:
    """An engine over the reference that hands out rows in another order in its first calls."""

    def __init__(self, denoiser, faults):
        self.inner, self.faults = oracle(denoiser), faults
        self.weights = WEIGHTS

    def generate(self, *args, **options):
        rows = self.inner.generate(*args, **options)
        if not self.faults:
            return rows
        self.faults.pop()
        return rows[::-1]

    def heartbeat(self):
        return 0

    def close(self):
        pass


class Foreign(NativeEngine):
    """An engine of other people, by its module."""


@pytest.mark.parametrize("engine", ["native", f"{__name__}:Foreign"])
@pytest.mark.parametrize("faults", [0, 1, 99])
def test_a_wrong_answer_is_asked_for_once_more_of_a_fresh_engine(denoiser, faults, engine):
    left, said, made = [None] * faults, [], []

    def worker(rank):
        made.append(rank)
        return EngineWorker(Mixes(denoiser, left), rank, packed=True)

    check = AnswerCheck(denoiser, CAN, STRATEGIES, engine=engine)
    pool = EnginePool(
        LocalWorkerGroup("engine", worker), rows_per_call=4, hang_s=60, max_restarts=3, check=check, log=said.append
    )
    pool.weights = WEIGHTS
    options = {"seed": 3, "samples_per_prompt": 2}
    if faults == 99:
        words = f"engine '{engine}' answers wrongly, also after it was built anew: prompt 'p[02]', sample 0: the row of"
        with pytest.raises(RunStopped if engine == "native" else UserError, match=words):
            pool.generate(PROMPTS, TEMPERED, **options)
        return
    found = pool.generate(PROMPTS, TEMPERED, **options)
    want = oracle(denoiser).generate(PROMPTS, TEMPERED, **options)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, want, strict=True))
    assert len(said) == faults and len(made) == 1 + faults == 1 + pool.restarts
    assert all("engine 0 is lost: its answer is not what was asked for: prompt 'p0', sample 0" in line for line in said)


def test_more_wrong_answers_than_restarts_end_the_run(denoiser):
    group = LocalWorkerGroup("engine", lambda rank: EngineWorker(Mixes(denoiser, [None]), rank, packed=False))
    check = AnswerCheck(denoiser, CAN, STRATEGIES)
    pool = EnginePool(group, rows_per_call=4, hang_s=60, max_restarts=0, check=check, log=print)
    pool.weights = WEIGHTS
    with pytest.raises(WorkerLost, match="its answer is not what was asked for"):
        pool.generate(PROMPTS, TEMPERED, seed=3, samples_per_prompt=2)
