"""Rollouters, transports and caches with one fault each."""

from __future__ import annotations

import dataclasses
import time

import torch

from dllm_rl.models.cache import BlockCache
from dllm_rl.protocols.rollouter import Rollouter, Turn
from dllm_rl.weight_transfer.in_process import InProcess
from rollouts.single_turn import SingleTurn


class KeepsTheFirst(InProcess):
    """Confuses buffers of one size."""

    def __init__(self):
        self.seen = {}

    def receive(self, payload, size, device):
        return self.seen.setdefault(size, payload.clone())


class Rounds(BlockCache):
    """Holds keys in half the precision."""

    def update(self, key, value, layer):
        keys, values = super().update(key, value, layer)
        return keys.bfloat16().to(keys.dtype), values


class KeepsTheFirstRows(BlockCache):
    """Keeps the first rows in the place of those that are wanted."""

    def keep_rows(self, rows):
        super().keep_rows(torch.arange(len(rows)))


class LosesATurn(SingleTurn):
    def roll_out(self, prompts, decoder, *, samples_per_prompt):
        return super().roll_out(prompts, decoder, samples_per_prompt=samples_per_prompt)[:-1]


class Edits(SingleTurn):
    def roll_out(self, prompts, decoder, *, samples_per_prompt):
        turns = super().roll_out(prompts, decoder, samples_per_prompt=samples_per_prompt)
        shorter = dataclasses.replace(turns[0].trajectory, completion_length=1)
        return [dataclasses.replace(turns[0], trajectory=shorter), *turns[1:]]


class Moody(SingleTurn):
    multi_turn = True

    def roll_out(self, prompts, decoder, *, samples_per_prompt):
        turns = super().roll_out(prompts, decoder, samples_per_prompt=samples_per_prompt)
        return [dataclasses.replace(turn, reward=float(time.perf_counter_ns())) for turn in turns]


class AsksAgain(Rollouter):
    """Its second turns are the prompt's first turns once more."""

    def roll_out(self, prompts, decoder, *, samples_per_prompt):
        turns = []
        for number in range(2):
            found = decoder.generate(prompts, samples_per_prompt=samples_per_prompt)
            turns += [
                Turn(
                    trajectory=t,
                    prompt=prompts[i // samples_per_prompt],
                    group=i // samples_per_prompt,
                    episode=i,
                    turn=number,
                )
                for i, t in enumerate(found)
            ]
        return turns
