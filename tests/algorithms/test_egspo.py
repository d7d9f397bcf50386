"""EGSPO: which steps are learned from, the gradient of their joint ratio, and what is forwarded with a graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from algorithms.egspo import most_uncertain
from dllm_rl.conformance.algorithms import Subject, learner_for
from dllm_rl.diffusion import likelihood
from dllm_rl.types import TrainingBatch

NAME = "algorithms.egspo:EGSPO"


def by_hand(batch, entropy, number):
    """(N, L) weights 1/(K |U_s|) of the tokens of each row's chosen steps, and the token lists of all its steps."""
    weight, steps = torch.zeros(batch.tokens.shape, dtype=torch.float64), []
    for row in range(len(batch)):
        tokens = batch.generated[row].nonzero().flatten().tolist()
        block = [0] * len(tokens) if batch.block_ids is None else batch.block_ids[row, tokens].tolist()
        found = {}
        for place, number_of_block in zip(tokens, block, strict=True):
            found.setdefault((number_of_block, int(batch.unmask_step[row, place])), []).append(place)
        steps.append(list(found.values()))
        best = sorted(found.values(), key=lambda places: -entropy[row, places].mean())[:number]
        for places in best:
            weight[row, places] = 1 / (len(best) * len(places))
    return weight, steps


@pytest.mark.parametrize("number", [1, 2, 9])
def test_gradient_at_the_old_policy(number):
    """d loss / d l_i = -A / (N K |U_s|) for the tokens of the K least certain steps, 0 elsewhere."""
    subject = Subject(NAME, {"steps": number})
    for (batch,) in subject.cases():
        seen = subject.experience(batch)
        seen = dataclasses.replace(seen, reference=seen.old)
        _, gradient = subject.gradient(seen, seen.old)
        weight, _ = by_hand(batch, seen.entropy, number)
        want = -weight * seen.advantage[:, None].double() / len(batch)
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-12)


def test_away_from_it_the_tokens_of_a_step_share_ratio_clip_and_divergence():
    """The equation of the docstring, step by step, in plain Python."""
    subject = Subject(NAME, {"steps": 2, "beta": 0.3})
    for (batch,) in subject.cases():
        seen = subject.experience(batch)
        new = subject.estimate(batch, seen.masks, seed=3)
        got, _ = subject.gradient(seen, new)
        weight, steps = by_hand(batch, seen.entropy, 2)
        total = torch.zeros((), dtype=torch.float64)
        for row, found in enumerate(steps):
            for places in found:
                n, old, ref = (e.token_logp[row, places].sum() for e in (new, seen.old, seen.reference))
                ratio, value = (n - old).exp(), seen.advantage[row].double()
                gain = torch.minimum(ratio * value, ratio.clamp(0.8, 1.5) * value)
                kl = (ref - n).exp() - 1 - (ref - n)
                total += weight[row, places[0]] * (gain - 0.3 * kl)
        torch.testing.assert_close(got, -total / len(batch), rtol=1e-6, atol=1e-9)


def test_equal_steps_are_taken_in_their_order_and_missing_ones_never():
    entropy = torch.tensor([[1.0, 2.0, 2.0, 0.0], [5.0, 0.0, 0.0, 9.0]])
    there = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert most_uncertain(entropy, there, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert most_uncertain(entropy, there, 1).tolist() == [[False, True, False, False], [True, False, False, False]]


def test_only_the_states_of_chosen_steps_are_forwarded_with_a_graph(monkeypatch):
    subject = Subject(NAME, {"steps": 1, "beta": 0.0})
    batch, scored = subject.batch(False), subject.scored()
    learner, masks = learner_for(subject.needs, batch, "tiny", tokens_per_microbatch=8), subject.masks(batch)
    calls, score = [], likelihood.score

    def counted(denoiser, batch, masks, work):
        calls.append((torch.is_grad_enabled(), len(work.draw)))
        return score(denoiser, batch, masks, work)

    monkeypatch.setattr(likelihood, "score", counted)
    advantage = torch.ones(len(batch))
    learner.update(TrainingBatch(batch, scored, advantage, [masks]), subject.algorithm)
    pairs = {graph: sum(number for on, number in calls if on == graph) for graph in (False, True)}
    assert pairs[True] == len(batch) < pairs[False], "one state of each row, and all states without a graph"
