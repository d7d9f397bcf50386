"""What engines over a torch network of ours share: roles, weights that are overwritten in place, sleep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config.plugins import build
from dllm_rl.config.section import Plugin
from dllm_rl.diffusion.layout import block_index
from dllm_rl.errors import UnknownWeight
from dllm_rl.models.digest import tensor_digests
from dllm_rl.models.evaluating import evaluating
from dllm_rl.models.offload import Offloader
from dllm_rl.models.tokenizers import vocabulary_digest
from dllm_rl.protocols.engine import (
    EVALUATE,
    TRAIN,
    Capabilities,
    EngineSetup,
    Role,
    RolloutEngine,
    TensorSpec,
)
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import Prompt, Sampling, Trajectory, WeightsVersion

_PROBED = 8  # tokens of the fixed sequence whose logits show whether an adapter arrives


class Sampler(Protocol):
    """Decodes prompts with one strategy.

    Attributes:
        weights: version of the weights that it decodes with; set before every call.
    """

    weights: WeightsVersion

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        partial: Sequence[Trajectory] | None = None,
        max_blocks: int | None = None,
    ) -> list[Trajectory]:
        """Decode; see RolloutEngine.generate."""


class TorchEngine(RolloutEngine):
    """Samplers over one denoiser, one per role. In the learner's process it decodes with the learner's own network."""

    def __init__(self, config: Any, setup: EngineSetup) -> None:
        super().__init__(config, setup)
        shared = setup.shared
        self.shares_weights = shared is not None
        if shared is not None:
            self.denoiser, tokenizer = shared.denoiser, shared.tokenizer
        else:
            self.denoiser, tokenizer = setup.load()
            self.denoiser.module.requires_grad_(False)
        self.device, self._vocabulary = self.denoiser.device, vocabulary_digest(tokenizer)
        strategies = (
            dict(shared.strategies)
            if shared is not None
            else {
                role: self._strategy(plugin, trained_here="policy" in setup.trains and role == TRAIN)
                for role, plugin in setup.strategies.items()
            }
        )
        strategies.setdefault(EVALUATE, strategies[TRAIN])
        self._samplers: dict[str, Sampler] = {role: self.sampler(strategy) for role, strategy in strategies.items()}
        self._parameters: dict[str, Tensor] = {}
        if "model" in setup.trains:
            self._parameters |= {name: value.data for name, value in self.denoiser.module.named_parameters()}
        if "policy" in setup.trains:
            policy, prefix = strategies[TRAIN].policy, "policy." if "model" in setup.trains else ""
            assert policy is not None, "strategies without a policy are refused at plan time"
            self._parameters |= {prefix + name: value.data for name, value in policy.named_parameters()}
        self._pushed: list[str] = []
        self._offloader: Offloader | None = None

    @classmethod
    @override
    def capabilities(cls, config: Any) -> Capabilities:
        every = frozenset(field.name for field in dataclasses.fields(Sampling))
        return Capabilities(sampled_logp=True, sampling=every, confidence=True, partial=True, lora=True, sleep=True)

    def sampler(self, strategy: UnmaskingStrategy, *, keep_confidence: bool = False) -> Sampler:
        """A decoder over self.denoiser.

        Args:
            strategy: which positions to commit.
            keep_confidence: fill Trajectory.confidence, also if the strategy does not read the whole canvas itself.
        """
        raise NotImplementedError

    @override
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
        sampler = self._samplers[role] if isinstance(role, str) else self._expert(role)
        sampler.weights = self.weights
        return sampler.generate(
            prompts,
            sampling,
            seed=seed,
            samples_per_prompt=samples_per_prompt,
            partial=partial,
            max_blocks=max_blocks,
        )

    @override
    def heartbeat(self) -> int:
        forwards: int = self.denoiser.forwards
        return forwards

    @override
    def begin_weights(self, tensors: Sequence[TensorSpec]) -> None:
        name = f"engine {self.setup.rank}"
        for spec in tensors:
            own = self._parameters.get(spec.name)
            if own is None:
                known = list(self._parameters)
                raise UnknownWeight(
                    f"{name} has no weight '{spec.name}'; it has {', '.join(known[:3])} and {len(known) - 3} more"
                )
            if tuple(own.shape) != spec.shape or own.dtype != spec.dtype:
                raise UnknownWeight(
                    f"{name}: '{spec.name}' is {tuple(own.shape)} {own.dtype}, it was offered {spec.shape} {spec.dtype}"
                )
        self._pushed = [spec.name for spec in tensors]

    @override
    def write_weights(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    @override
    def commit_weights(self) -> Mapping[str, int]:
        return tensor_digests((name, self._parameters[name]) for name in self._pushed)

    @override
    def probe_logits(self) -> Tensor:
        denoiser = self.denoiser
        tokens = torch.full((1, min(_PROBED, denoiser.max_length)), denoiser.mask_id, device=denoiser.device)
        tokens[0, 0] = denoiser.eos_id
        valid = torch.ones_like(tokens, dtype=torch.bool)
        block_ids = None
        if denoiser.block_size is not None:
            start = torch.ones(1, dtype=torch.int64)
            block_ids = block_index(start, tokens.shape[1], denoiser.block_size, denoiser.block_origin).to(
                tokens.device
            )
        with torch.no_grad(), evaluating(denoiser.module):
            states = denoiser.hidden_states(tokens, tokens == denoiser.mask_id, valid, block_ids)
            logits: Tensor = denoiser.unembed(states[0]).float().cpu()
        return logits

    @override
    def sleep(self) -> None:
        if self._offloader is None:  # not before: it holds on to the memory that the weights have when it is made
            self._offloader = Offloader(parameter.data for parameter in self.denoiser.module.parameters())
        self._offloader.sleep()

    @override
    def wake(self) -> None:
        if self._offloader is not None:
            self._offloader.wake()

    def _strategy(self, plugin: Mapping[str, Any], *, trained_here: bool) -> UnmaskingStrategy:
        chosen = Plugin.model_validate(plugin)
        strategy: UnmaskingStrategy = build("strategies", chosen.name, chosen.options)
        strategy.bind(self._vocabulary, self.denoiser.device, trained_here=trained_here)
        return strategy

    def _expert(self, plugin: Mapping[str, Any]) -> Sampler:
        return self.sampler(self._strategy(plugin, trained_here=False), keep_confidence=True)
