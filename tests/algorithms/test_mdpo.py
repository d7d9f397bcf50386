"""MDPO: an episode of denoising is the decoding it stands for; scores, weights and the choice of steps by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases, engines
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.data.collate import collate
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.types import GIVEN, Sampling

NAME, ROLLOUTER = "algorithms.mdpo:MDPO", "algorithms.mdpo:DenoisingSteps"
CANVAS = 8


class Decoder:
    """The reference engine over a tiny model."""

    def __init__(self, tokens_per_step, temperature):
        self.tokenizer, self._engine = cases.tokenizer(), engines.oracle(cases.denoiser("tiny"))
        self.sampling = Sampling(max_new_tokens=CANVAS, tokens_per_step=tokens_per_step, temperature=temperature)
        self.calls = 0

    def generate(self, prompts, *, samples_per_prompt=1):
        self.calls += 1
        return self._engine.generate(prompts, self.sampling, seed=0, samples_per_prompt=samples_per_prompt)


PROMPTS = [dataclasses.replace(prompt, injected={}) for prompt in engines.PROMPTS]


def episodes(tokens_per_step, *, temperature=1.0, samples=2):
    rollouter, decoder = (
        build("rollouters", ROLLOUTER, {"tokens_per_step": tokens_per_step}),
        Decoder(CANVAS, temperature),
    )
    turns = rollouter.roll_out(PROMPTS, decoder, samples_per_prompt=samples)
    return decoder, [[t for t in turns if t.episode == e] for e in range(len(PROMPTS) * samples)]


def says_the_end(turn):
    t = turn.trajectory
    return bool((t.tokens[t.prompt_length :] == cases.tokenizer().eos_token_id).any())


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, CANVAS])
def test_its_last_completion_is_what_the_engine_decodes_greedily(tokens_per_step):
    """Where no step predicts an end, which the engine commits like other tokens."""
    decoder, made = episodes(tokens_per_step, temperature=0.0, samples=1)
    whole = Decoder(tokens_per_step, 0.0).generate(PROMPTS)
    compared = 0
    for episode, t in zip(made, whole, strict=True):
        if not any(map(says_the_end, episode)):
            assert len(episode) == t.num_forwards == math.ceil(CANVAS / tokens_per_step)
            assert torch.equal(episode[-1].trajectory.tokens, t.tokens)
            compared += 1
    assert compared >= 3 and decoder.calls == max(map(len, made)), "one engine call per step"


def test_a_step_is_one_forward_from_the_tokens_that_were_committed_before_it():
    _, made = episodes(3, samples=8)
    eos, steps, ends = cases.tokenizer().eos_token_id, 0, 0
    for episode in made:
        committed, left = {}, CANVAS
        for number, turn in enumerate(episode):
            t = turn.trajectory
            canvas, start = t.tokens[t.prompt_length :], t.prompt_length
            masked = t.unmask_step[start:] >= 0
            assert turn.turn == number and t.num_forwards == 1 and dict(turn.prompt.injected) == committed
            assert left > 0 and (~masked).nonzero().flatten().tolist() == sorted(committed)
            assert all(canvas[offset] == token for offset, token in committed.items())
            free = [o for o in range(t.completion_length) if masked[o] and canvas[o] != eos]
            for offset in sorted(free, key=lambda o: -float(t.behaviour_logp[start + o]))[:3]:
                committed[offset] = int(canvas[offset])
            left = len(free) - 3
            steps, ends = max(steps, number + 1), ends + (t.finish == "eos" and left <= 0)
        assert left <= 0, "it goes on while a token before the end is masked"
        assert eos not in committed.values()
    assert steps == 3 and ends, "some sample has three steps, some ended before its canvas was full"


def test_rows_are_scored_in_the_state_of_their_step_whatever_lies_after_their_end():
    """Some steps predict an end before tokens that are committed: those stay in sight, and are not scored."""
    turns = [turn for episode in episodes(2, samples=8)[1] for turn in episode]
    group, episode, number = zip(*((t.group, t.episode, t.turn) for t in turns), strict=True)
    model = cases.denoiser("tiny")
    batch = collate([t.trajectory for t in turns], model, group=group, episode=episode, turn=number)
    masks, behind = Subject(NAME, {}).algorithm.masks(batch, torch.Generator()), 0
    assert len(masks.mask) == 1, "one forward per step"
    for row, turn in enumerate(turns):
        start = turn.trajectory.prompt_length
        given = torch.tensor([offset in turn.prompt.injected for offset in range(CANVAS)])
        end = turn.trajectory.completion_length
        assert torch.equal(masks.mask[0, row, start : start + CANVAS], ~given)
        assert torch.equal(masks.weight[0, row, start : start + CANVAS] != 0, ~given & (torch.arange(CANVAS) < end))
        behind += bool(given[end:].any())
    assert behind, "some token was committed behind a later end"


def steps(rewards, turns, excluded=()):
    """One prompt's episodes: rows of given rewards and numbers of turns."""
    rows = torch.arange(sum(turns)) % 6
    batch = dataclasses.replace(
        cases.batch(block_causal=False).select(rows),
        group=torch.zeros(sum(turns), dtype=torch.int64),
        episode=torch.arange(len(turns)).repeat_interleave(torch.tensor(turns)),
        turn=torch.cat([torch.arange(n) for n in turns]),
    )
    scored = cases.rewards(rewards)
    gone = torch.isin(batch.episode, torch.tensor(excluded, dtype=torch.int64))
    return batch, dataclasses.replace(scored, included=~gone, total=scored.total.masked_fill(gone, 0.0))


def test_scores_of_steps_by_hand():
    """Episodes of 3, 3 and 2 steps; step by step z-scores of R_s - R_{s-1} + the mean of what follows."""
    batch, scored = steps([0.0, 1.0, 0.5, 1.0, 0.0, 0.0, 0.5, 1.0], [3, 3, 2])
    score = [
        [0.0 - 0.0 + 0.75, 1.0 - 0.0 + 0.5, 0.5 - 1.0 + 0.5],
        [1.0 - 0.0 + 0.0, 0.0 - 1.0 + 0.0, 0.0 - 0.0 + 0.0],
        [0.5 - 0.0 + 1.0, 1.0 - 0.5 + 1.0],
    ]
    want = []
    for row in score:
        for s, value in enumerate(row):
            peers = torch.tensor([other[s] for other in score if len(other) > s])
            deviation = peers.std(unbiased=False)
            want.append(float((value - peers.mean()) / deviation) if deviation > 0 else 0.0)
    share = batch.completion.sum(-1) / batch.generated.sum(-1)
    got = Subject(NAME, {}).algorithm.advantages(scored, batch)
    torch.testing.assert_close(got, torch.tensor(want) * share, atol=1e-5, rtol=1e-5)


def test_the_steps_with_most_to_teach_are_kept():
    """Scores of step 1 are 0 - 0 + 1 and 1 - 1 + 1: it teaches nothing."""
    batch, scored = steps([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], [3, 3])
    for k, kept in ((1, [True, False, False]), (2, [True, False, True]), (3, [True, True, True])):
        assert Subject(NAME, {"steps": k}).algorithm.keep(scored, batch).view(2, 3).tolist() == [kept] * 2
    _, failed = steps([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], [3, 3], excluded=[1])
    assert Subject(NAME, {}).algorithm.keep(failed, batch).tolist() == [True] * 3 + [False] * 3


def test_the_loss_by_hand_around_committed_tokens():
    """Row 0 had 3 of its 8 tokens given: 5 are scored, with C/|M| = 8/5, each weighing its confidence."""
    subject = Subject(NAME, {"beta": 0.02})
    batch = subject.batch(block_causal=False)
    hint = torch.zeros_like(batch.hint)
    hint[0, 3:6] = True
    step = torch.where(batch.unmask_step >= 0, 0, GIVEN).masked_fill(hint, GIVEN)  # x_s is one forward
    batch = dataclasses.replace(batch, hint=hint, unmask_step=step)
    seen = subject.experience(batch)
    assert len(seen.masks.mask) == 1 and not seen.masks.mask[0][hint].any()
    old, reference, new = (cases.estimate(batch, seen.masks, Needs(draws=True), seed=seed) for seed in (5, 6, 7))
    seen = dataclasses.replace(seen, old=old, reference=reference)
    want = 0.0
    for row in range(len(batch)):
        masked = batch.generated[row].nonzero().flatten().tolist()
        rate = int(batch.completion[row].sum()) / len(masked)
        a = float(seen.advantage[row]) / rate  # advantages() holds A C/|M|
        for i in masked:
            logp, was, ref = (float(one.draw_token_logp[0, row, i]) for one in (new, old, reference))
            r = math.exp(logp - was)
            gain = rate * min(r * a, min(max(r, 0.8), 1.2) * a) - 0.02 * (logp - ref) ** 2 / 2
            want -= math.exp(was) * gain / len(masked) / len(batch)
    assert float(subject.algorithm.loss(new, seen).value) == pytest.approx(want, rel=1e-6)
