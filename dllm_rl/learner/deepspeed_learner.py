"""The learner on DeepSpeed: one rank of several, or one with its states off the GPU. Same losses as the torch learner.

Ranks hold different rows of one batch. With sharded parameters every forward is a collective, so all ranks run the same
number of micro-batches, in the same number of chunks; who has less to do forwards idle ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from dllm_rl.diffusion import likelihood
from dllm_rl.errors import UserError
from dllm_rl.learner.model_scorer import ModelScorer, Scored, Scoring
from dllm_rl.learner.optimizer import Optimizer
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.learner.zero import Root, ZeroOptimizer
from dllm_rl.types import MaskSample, RolloutBatch

TAG, UNIVERSAL = "state", "any_size"


class RankScorer(ModelScorer):
    """A ModelScorer whose forwards run under DeepSpeed's engine.

    Attributes:
        engine: set once it is there.
    """

    engine: Any

    @override
    def plan(self, batch: RolloutBatch, masks: MaskSample) -> list[likelihood.Work]:
        own = super().plan(batch, masks)
        number = max(1, *self._largest([len(own)]))  # without any backward, DeepSpeed would step without gradients
        zero = torch.zeros(1, dtype=torch.int64)
        nothing = likelihood.Work(zero, zero, zero, zero, int(batch.valid[0].sum()), idle=True)
        work = own + [nothing] * (number - len(own))
        if self.engine.zero_optimization_stage() < 3:
            return work
        counts = [0 if part.idle else int((masks.weight[part.draw, part.row] != 0).sum()) for part in work]
        vocabulary = self.denoiser.vocab_size
        chunks = self._largest([likelihood.chunk_count(count, vocabulary) for count in counts])
        return [dataclasses.replace(part, chunks=most) for part, most in zip(work, chunks, strict=True)]

    @override
    def _forward(self, function: Scoring, batch: RolloutBatch, masks: MaskSample, work: likelihood.Work) -> Scored:
        self.ticks += 1
        scored: Scored = self.engine(function, batch, masks, work)
        return scored

    def _largest(self, values: Sequence[int]) -> list[int]:
        if dist.get_world_size() == 1:
            return list(values)
        most = torch.tensor(values, dtype=torch.int64, device=self.denoiser.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        found: list[int] = most.tolist()
        return found


class DeepSpeedLearner(TorchLearner):
    """A rank of a ZeRO group; zero.join_ranks comes first."""

    _model_scorer = RankScorer
    _model: RankScorer
    _optimizer: ZeroOptimizer

    @override
    def _make_optimizer(self, total_steps: int) -> Optimizer:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        made = ZeroOptimizer(Root(self.denoiser), [p for _, p in self._trained], self._config, total_steps)
        self._model.engine = made.engine
        return made

    @override
    def _over_ranks(self, scalars: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        everyone: list[Any] = [None] * self._size
        dist.all_gather_object(everyone, {name: value.double().cpu() for name, value in scalars.items()})
        names = dict.fromkeys(name for one in everyone for name in one)
        return {name: sum((one[name] for one in everyone if name in one), torch.zeros(())) for name in names}

    @override
    @contextlib.contextmanager
    def reading(self, parameters: Sequence[nn.Parameter], *, writing: bool = False) -> Iterator[None]:
        import deepspeed

        if self._config.zero_stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if writing else None):
            yield

    @override
    def save(self, folder: Path) -> None:
        """Rank 0 writes the weights (or the adapter) below folder/model, all ranks their states below folder/zero."""
        with self.reading([p for _, p in self._trained] if self.denoiser.adapter is not None else self._everything()):
            if self._rank == 0:
                self._model.save(folder / "model")
        self._optimizer.engine.save_checkpoint(str(folder / "zero"), tag=TAG, exclude_frozen_parameters=True)
        if self._rank == 0:
            torch.save({"step": self.step, "size": self._size}, folder / "optimizer.pt")
        self._save_reference(folder, writes=self._rank == 0)
        dist.barrier()

    @override
    def load(self, folder: Path) -> None:
        """Restore what save wrote: bit for bit at the same number of ranks, else through DeepSpeed's universal layout.

        Raises:
            UserError: a checkpoint of the other learner.
        """
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        if not (folder / "zero").is_dir():
            raise UserError(f"checkpoint '{folder}' was written by learner.backend: torch; set it, or start a new run")
        engine, where, tag = self._optimizer.engine, folder / "zero", TAG
        if state["size"] != self._size and self._config.zero_stage > 0:
            where, tag = self._universal(folder), UNIVERSAL
            engine._config.load_universal_checkpoint = True  # private: read by load_checkpoint and the optimiser
        loaded, _ = engine.load_checkpoint(str(where), tag=tag, load_module_strict=False)
        if loaded is None:
            raise UserError(f"checkpoint '{folder}': DeepSpeed found no state in {where}")
        self._optimizer.separate_steps()
        self.step = state["step"]
        self._load_reference(folder)

    def _universal(self, folder: Path) -> Path:
        """The states in DeepSpeed's layout for any number of ranks, beside the checkpoint's own; rank 0 converts."""
        where = folder / "universal"
        if self._rank == 0 and not (where / UNIVERSAL).is_dir():
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(folder / "zero" / TAG), "--output_folder", str(where / UNIVERSAL)]
            command += ["--inject_missing_state"] if self._config.zero_stage < 3 else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(where, ignore_errors=True)
                raise UserError(f"checkpoint '{folder}' cannot be converted: {done.stderr.strip().splitlines()[-1]}")
        dist.barrier()
        return where

    def _everything(self) -> list[nn.Parameter]:
        return list(self.denoiser.module.parameters())
