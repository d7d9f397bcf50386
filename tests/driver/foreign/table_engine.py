"""A package of somebody else's: an engine that is no torch module, keeps weights of its own and decodes with numpy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from dllm_rl.errors import UnknownWeight
from dllm_rl.models.digest import tensor_digests
from dllm_rl.protocols.engine import Capabilities, RolloutEngine
from dllm_rl.seeding import generator_for
from dllm_rl.types import GIVEN, Trajectory

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TableEngine(RolloutEngine):
    """Samples every token from head @ mean embedding of the prompt: one forward per completion."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        sharpness: float = 1.0  # logits are multiplied by it
        diary: str = ""  # file that notes what happens

    def __init__(self, config, setup):
        super().__init__(config, setup)
        self.tables, self.beats, self.pushed = {}, 0, []
        self.note(f"made from {Path(setup.path).name} in {os.getpid()}, shared {setup.shared is not None}")

    def note(self, text):
        if self.config.diary:
            with open(self.config.diary, "a") as file:
                file.write(f"engine {self.setup.rank}: {text}\n")

    @classmethod
    @override
    def capabilities(cls, config):
        return Capabilities(exact=False, attention=frozenset({"full"}))

    @override
    def heartbeat(self):
        return self.beats

    @override
    def begin_weights(self, tensors):
        names = {spec.name for spec in tensors}
        if not {EMBEDDING, HEAD} <= names:
            raise UnknownWeight(f"a table engine needs {EMBEDDING} and {HEAD}")
        self.pushed = list(tensors)

    @override
    def write_weights(self, values):
        for name, value in values.items():
            self.tables[name] = value.detach().cpu().numpy().copy()

    @override
    def commit_weights(self):
        self.note("pushed")
        return tensor_digests((spec.name, torch.from_numpy(self.tables[spec.name])) for spec in self.pushed)

    @override
    def close(self):
        self.note("closed")

    @override
    def generate(self, prompts, sampling, *, seed, samples_per_prompt=1, partial=None, max_blocks=None, role="train"):
        found = []
        for prompt in prompts:
            table = self.tables[EMBEDDING][list(prompt.token_ids)].mean(0)
            logits = self.config.sharpness * self.tables[HEAD] @ table
            logits[1] = -np.inf  # the mask token of the tiny family is no token
            logp = logits - np.logaddexp.reduce(logits)
            for sample in range(samples_per_prompt):
                generator = generator_for(seed, prompt.uid, sample)
                size = sampling.max_new_tokens
                drawn = torch.multinomial(torch.from_numpy(np.exp(logp)), size, replacement=True, generator=generator)
                if sampling.temperature == 0:
                    drawn = torch.full((size,), int(logp.argmax()))
                found.append(self._trajectory(prompt, sample, drawn, torch.from_numpy(logp).float()[drawn]))
                self.beats += 1
        return found

    def _trajectory(self, prompt, sample, drawn, logp):
        start, size = len(prompt.token_ids), len(drawn)
        given, place = torch.full((start,), GIVEN), torch.arange(size) + start
        ends = (drawn == 2).nonzero().flatten().tolist()  # EOS of the tiny family
        step = torch.cat([given, torch.zeros(size, dtype=torch.int64)])
        return Trajectory(
            prompt_uid=prompt.uid,
            sample=sample,
            tokens=torch.cat([torch.tensor(prompt.token_ids), drawn]),
            prompt_length=start,
            completion_length=ends[0] + 1 if ends else size,
            events=torch.stack([torch.zeros_like(place), place, drawn], dim=1),
            unmask_step=step,
            behaviour_logp=torch.cat([torch.zeros(start), logp]),
            num_forwards=1,
            finish="eos" if ends else "length",
            exact=False,
            weights=self.weights,
            weights_step=torch.where(step == GIVEN, GIVEN, self.weights.step),
        )


class LosesBytes(TableEngine):
    """Keeps something else than what it was sent."""

    def write_weights(self, values):
        super().write_weights(values)
        self.tables[HEAD] = self.tables.get(HEAD, np.zeros(1)) + 1
