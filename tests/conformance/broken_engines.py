"""Engines with one fault each; test_conformance.py shows which check catches it."""

from __future__ import annotations

import dataclasses

import torch

from dllm_rl.models.digest import tensor_digests
from dllm_rl.types import GIVEN
from rollouts.native import NativeEngine


class ByPosition(NativeEngine):
    """Seeds rows by their place in the batch."""

    def generate(self, prompts, sampling, *, seed, **options):
        return super().generate(prompts, sampling, seed=seed + len(prompts), **options)


class OneSeed(NativeEngine):
    def generate(self, prompts, sampling, *, seed, **options):
        return super().generate(prompts, sampling, seed=0, **options)


class Approximate(NativeEngine):
    def generate(self, prompts, sampling, *, seed, **options):
        rows = super().generate(prompts, sampling, seed=seed, **options)
        return [dataclasses.replace(t, behaviour_logp=t.behaviour_logp * 1.01) for t in rows]


class TellsTheModels(NativeEngine):
    """Gives the model's probability of a token as that with which it was drawn."""

    def generate(self, prompts, sampling, *, seed, **options):
        rows = super().generate(prompts, sampling, seed=seed, **options)
        return rows if sampling.plain else [dataclasses.replace(t, sampled_logp=t.behaviour_logp) for t in rows]


class MiscountsForwards(NativeEngine):
    def generate(self, prompts, sampling, *, seed, **options):
        rows = super().generate(prompts, sampling, seed=seed, **options)
        return [dataclasses.replace(t, num_forwards=t.num_forwards + 1) for t in rows]


class TurnsRowsRound(NativeEngine):
    def generate(self, prompts, sampling, *, seed, **options):
        return super().generate(prompts, sampling, seed=seed, **options)[::-1]


class MixesRows(NativeEngine):
    """Gives each prompt what was generated for the next one, with everything in its place."""

    def generate(self, prompts, sampling, *, seed, **options):
        rows = super().generate(prompts, sampling, seed=seed, **options)
        given = {prompt.uid for prompt in prompts if prompt.injected}
        free = [number for number, row in enumerate(rows) if row.prompt_uid not in given]
        other = dict(zip(free, free[2:] + free[:2], strict=True))
        return [self.with_completion(row, rows[other.get(number, number)]) for number, row in enumerate(rows)]

    def with_completion(self, row, of):
        def joined(name):
            return torch.cat([getattr(row, name)[: row.prompt_length], getattr(of, name)[of.prompt_length :]])

        fields = ("tokens", "unmask_step", "behaviour_logp", "weights_step", "order")
        shift = torch.tensor([0, row.prompt_length - of.prompt_length, 0])
        sampled = None if row.sampled_logp is None else joined("sampled_logp")
        return dataclasses.replace(
            row,
            **{name: joined(name) for name in fields},
            sampled_logp=sampled,
            events=of.events + shift,
            completion_length=of.completion_length,
            num_forwards=of.num_forwards,
            finish=of.finish,
        )


class CutsPrompts(NativeEngine):
    def generate(self, prompts, sampling, *, seed, **options):
        prompts = [dataclasses.replace(p, token_ids=p.token_ids[-40:]) for p in prompts]
        return super().generate(prompts, sampling, seed=seed, **options)


class StartsOver(NativeEngine):
    """Decodes rows that were paused from the start."""

    def generate(self, prompts, sampling, *, partial=None, **options):
        return super().generate(prompts, sampling, **options)


class ClaimsWhatOthersDecoded(NativeEngine):
    """Stamps tokens that were decoded before a pause with the weights of after it."""

    def generate(self, prompts, sampling, *, partial=None, **options):
        rows = super().generate(prompts, sampling, partial=partial, **options)
        own = [torch.where(t.weights_step == GIVEN, GIVEN, self.weights.step) for t in rows]
        return [dataclasses.replace(t, weights_step=step) for t, step in zip(rows, own, strict=True)]


class KeepsTheBuffer(NativeEngine):
    """Refers to the buffer of a push instead of copying it."""

    def write_weights(self, values):
        self._parameters |= values
        for name, value in values.items():
            self.denoiser.module.get_parameter(name).data = value


class RepeatsTheSendersDigests(NativeEngine):
    """Says that it holds what was announced, whatever it has done with it."""

    def write_weights(self, values):
        self.said = getattr(self, "said", {}) | tensor_digests(values.items())

    def commit_weights(self):
        return self.said


class TakesAnyName(NativeEngine):
    def begin_weights(self, tensors):
        super().begin_weights([spec for spec in tensors if spec.name in self._parameters])


class WakesEmpty(NativeEngine):
    def wake(self):
        for parameter in self.denoiser.module.parameters():
            storage = parameter.data.untyped_storage()
            storage.resize_(parameter.numel() * parameter.element_size())
            parameter.data.zero_()


class StandsStill(NativeEngine):
    def heartbeat(self):
        return 0
