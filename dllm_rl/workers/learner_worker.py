"""A learner rank as a worker of a group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl.cluster.group import WorkerRank
from dllm_rl.config.schema import Config
from dllm_rl.diffusion.layout import block_rule
from dllm_rl.learner.policy_scorer import PolicyScorer
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.lora import merged_updates
from dllm_rl.models.teacher import load_teacher
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import LikelihoodEstimate, MaskSample, RolloutBatch, Sampling, TrainingBatch, WeightsVersion
from dllm_rl.weight_transfer.keyed_store import keyed_store
from dllm_rl.weight_transfer.sender import OutgoingTensor, WeightSender

MEET_S = 600.0  # rank 0 may still be importing torch and loading its model


def make_learner(
    config: Config,
    folder: Path,
    algorithm: Algorithm,
    strategy: UnmaskingStrategy,
    denoiser: TransformersDenoiser,
    tokenizer: Any,
    sampling: Sampling,
    rank: WorkerRank,
) -> TorchLearner:
    """The learner that a configuration asks for, over a model.

    Args:
        config: of the run.
        folder: the run folder.
        algorithm: the method.
        strategy: of training; its policy may be what is trained.
        denoiser: trained in place.
        tokenizer: saved beside the weights.
        sampling: of training.
        rank: of this worker.
    """
    needs, policy = algorithm.needs, None
    if "model" not in needs.trains:
        denoiser.module.requires_grad_(False)
    if "policy" in needs.trains:
        size, origin = block_rule(denoiser, sampling)
        policy = PolicyScorer(
            strategy,
            config.learner.tokens_per_microbatch,
            block_size=size,
            block_origin=origin,
            sees_block_only=denoiser.block_size is not None,
        )
    kind: type[TorchLearner] = TorchLearner
    if config.learner.backend == "deepspeed":
        from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner
        from dllm_rl.learner.zero import join_ranks

        store, _ = keyed_store(rank.address, rank.port, rank.key, leads=rank.rank == 0, timeout_s=MEET_S)
        join_ranks(rank.rank, rank.size, store)
        kind = DeepSpeedLearner
    return kind(
        denoiser,
        tokenizer,
        config.learner,
        needs,
        total_steps=config.run.steps,
        seed=config.run.seed,
        policy=policy,
        teacher=load_teacher(config, denoiser, tokenizer),
        dump_folder=folder / "dumps",
    )


class LearnerWorker(WeightSender):
    """A learner rank, which sends its weights too."""

    def __init__(
        self,
        learner: TorchLearner,
        rank: WorkerRank,
        denoiser: TransformersDenoiser,
        *,
        merged: bool = False,
        shares: bool = False,
    ) -> None:
        """Look at what is to be sent.

        Args:
            learner: of this rank.
            rank: of this worker.
            denoiser: the model.
            merged: send adapted layers whole instead of the adapter.
            shares: an engine in another process is waiting for this one's device.
        """
        self.learner, self._denoiser = learner, denoiser
        self._shares = shares and denoiser.device.type == "cuda"
        trained = dict(learner.named_weights())
        plain = {name: p for name, p in trained.items() if not (merged and ".lora_" in name)}
        updates = merged_updates(denoiser) if len(plain) < len(trained) else ()
        outgoing = [OutgoingTensor(name, sources, make) for name, sources, make in updates]
        outgoing += [OutgoingTensor(name, [p], p.detach) for name, p in plain.items()]
        super().__init__(outgoing, learner.reading, rank=rank.rank, host=rank.host)
        self._probe = next((p for name, p in trained.items() if ".lora_B." in name), None)
        self._kept: Tensor | None = None

    @property
    def ticks(self) -> int:
        """Micro-batches and buckets so far; a sign of life."""
        return self.learner.ticks

    def update(self, training: TrainingBatch, algorithm: Algorithm) -> Mapping[str, float]:
        """See Learner."""
        metrics = self.learner.update(training, algorithm)
        if self._shares:
            torch.cuda.empty_cache()  # what the backward pass needed is kept for the next one otherwise
        return metrics

    def score(
        self,
        batch: RolloutBatch,
        masks: MaskSample,
        *,
        reference: bool = False,
        draws: bool = False,
        sampling: Sampling | None = None,
    ) -> LikelihoodEstimate:
        """See Learner; on the CPU."""
        return self.learner.score(batch, masks, reference=reference, draws=draws, sampling=sampling).cpu()

    def skip(self) -> None:
        """See Learner."""
        self.learner.skip()

    def reference_digest(self) -> str:
        """See Learner."""
        return self.learner.reference_digest()

    def drop_reference(self) -> None:
        """See Learner."""
        self.learner.drop_reference()

    def version(self) -> WeightsVersion:
        """See Learner."""
        return self.learner.version()

    def save(self, folder: Path) -> None:
        """See Learner."""
        self.learner.save(folder)

    def load(self, folder: Path) -> int:
        """See Learner; returns the step."""
        self.learner.load(folder)
        return self.learner.step

    def perturb(self) -> str | None:
        """Change one B matrix of the adapter so that logits must change; returns its name, None without an adapter."""
        if self._probe is None:
            return None
        with torch.no_grad(), self._gathering([self._probe], writing=True):
            self._kept = self._probe.detach().clone()
            self._probe.add_(1.0)
        return "lora_B"

    def restore(self) -> None:
        """Undo perturb()."""
        assert self._probe is not None and self._kept is not None, "perturb() comes first"
        with torch.no_grad(), self._gathering([self._probe], writing=True):
            self._probe.copy_(self._kept)
        self._kept = None
