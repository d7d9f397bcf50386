"""The contract of rollout engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import Prompt, Sampling, Trajectory, WeightsVersion

TRAIN, EVALUATE = "train", "evaluate"
Role = str | Mapping[str, Any]  # TRAIN, EVALUATE, or an expert's strategy: its name and options
NO_WEIGHTS = WeightsVersion(step=-1, digest="")
_ALIGN = 16  # bytes; any dtype can be viewed at such an offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do; a plan that asks for more is refused before anything starts.

    Attributes:
        families: names of the model families that it serves; None = all.
        attention: attention patterns that it serves.
        exact: behaviour_logp are those of the learner's network (no approximate cache, no quantised weights).
        step_maps: trajectories tell which forward committed each token, in which order.
        logp: trajectories hold the log-probability of each token under the model.
        sampled_logp: and that under the distribution which it was drawn from, where that is another one.
        sampling: further fields of Sampling that it follows, beside max_new_tokens, block_size, tokens_per_step,
            temperature, top_k and top_p, which every engine has to.
        confidence: trajectories hold the confidences that unmasking policies are trained on.
        partial: completions can pause at block boundaries and go on later.
        lora: adapters are served as they are; without it they arrive merged (cluster.push: merged).
        sleep: weights can leave the device and come back.
        needs_gpu: it runs on a GPU only.
    """

    families: frozenset[str] | None = None
    attention: frozenset[Literal["full", "block_causal"]] = frozenset({"full", "block_causal"})
    exact: bool = True
    step_maps: bool = True
    logp: bool = True
    sampled_logp: bool = False
    sampling: frozenset[str] = frozenset()
    confidence: bool = False
    partial: bool = False
    lora: bool = False
    sleep: bool = False
    needs_gpu: bool = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one tensor of a push."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a bucket, the gap to the next tensor included."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedModel:
    """What a learner in the same process trains, for engines that can decode with the very same tensors.

    Attributes:
        denoiser: the learner's network.
        tokenizer: of the model.
        strategies: by role; a policy that is trained is the learner's own.
    """

    denoiser: Any
    tokenizer: Any
    strategies: Mapping[str, UnmaskingStrategy]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What an engine is made of, beside its own options.

    Attributes:
        rank: number of the engine.
        path: folder or hub name of the model, the same on every node.
        strategies: role -> name and options of its unmasking strategy.
        trains: what the learner sends by parameter name: the "model", the unmasking strategy's "policy", or both, the
            names of the policy then with "policy." in front.
        load: gives the model as a Denoiser of ours on this process's device, and its tokenizer; takes memory only if it
            is called.
        shared: the learner's model, if the learner is in this process.
    """

    rank: int
    path: str
    strategies: Mapping[str, Mapping[str, Any]]
    trains: frozenset[Literal["model", "policy"]]
    load: Callable[[], tuple[Any, Any]]
    shared: SharedModel | None = None


class RolloutEngine:
    """A decoder of prompts with weights that the learner sends.

    Attributes:
        weights: version of the weights that it holds; set by its worker once the digests of a push have been compared.
        shares_weights: it decodes with the tensors of EngineSetup.shared, so that nothing needs to be sent.
        device: where buffers of weights are wanted.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options of the engine."""

    weights: WeightsVersion = NO_WEIGHTS
    shares_weights: bool = False
    device: torch.device = torch.device("cpu")

    def __init__(self, config: Any, setup: EngineSetup) -> None:
        self.config, self.setup = config, setup

    @classmethod
    def capabilities(cls, config: Any) -> Capabilities:
        """What the engine can do with these options; asked in the driver, before any engine is made."""
        return Capabilities()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        partial: Sequence[Trajectory] | None = None,
        max_blocks: int | None = None,
        role: Role = TRAIN,
    ) -> list[Trajectory]:
        """Decode every prompt samples_per_prompt times, prompt-major order.

        A trajectory is a function of (weights, prompt, sample index, sampling, seed) only: not of the batch it is in,
        nor of where it was paused while the weights were the same.

        Args:
            prompts: what to complete.
            sampling: how to decode.
            seed: of all randomness.
            samples_per_prompt: rows of each prompt.
            partial: what an earlier call with the same arguments returned, to go on with where it was paused: blocks
                that are finished stay, whatever the weights now say.
            max_blocks: pause rows once so many decoding blocks of their canvas are finished; None = decode everything.
            role: which strategy decodes.
        """
        raise NotImplementedError

    def heartbeat(self) -> int:
        """A number that grows while the engine works, also during a call; one that stands still has hung."""
        raise NotImplementedError

    def begin_weights(self, tensors: Sequence[TensorSpec]) -> None:
        """Prepare for a push of these tensors; nothing is decoded until its digests have been compared.

        Raises:
            UnknownWeight: a tensor that the engine does not have, or of another shape or dtype.
        """
        raise NotImplementedError

    def write_weights(self, values: Mapping[str, Tensor]) -> None:
        """Take over some of the tensors; they are views of a buffer that is used again afterwards."""
        raise NotImplementedError

    def commit_weights(self) -> Mapping[str, int]:
        """Finish the push: drop what depends on old weights (prefix caches) and return the digests of what is held.

        Returns:
            name -> models.digest.tensor_digest of the engine's own copy, for every tensor of the push.
        """
        raise NotImplementedError

    def probe_logits(self) -> Tensor | None:
        """(8, V) float32 logits of a fixed sequence, to see whether a pushed adapter acts; None = cannot tell."""
        return None

    def sleep(self) -> None:
        """Give the device's memory back; nothing is decoded until wake()."""
        raise NotImplementedError

    def wake(self) -> None:
        """Undo sleep()."""
        raise NotImplementedError

    def close(self) -> None:
        """End what the engine has started (processes, servers)."""
