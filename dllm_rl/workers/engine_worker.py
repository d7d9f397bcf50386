"""An engine as a worker of a group: it decodes for several roles with the same weights, and receives new ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_rl.cluster.group import WorkerRank
from dllm_rl.config.plugins import build, engine_class
from dllm_rl.config.schema import Config
from dllm_rl.config.section import Plugin
from dllm_rl.diffusion.layout import block_index
from dllm_rl.errors import RunStopped
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.protocols.engine import RolloutEngine
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import Prompt, Sampling, Trajectory, WeightsVersion
from dllm_rl.weight_transfer.broadcast import Broadcast
from dllm_rl.weight_transfer.receiver import Layout, TensorSpec, WeightReceiver, size_of
from dllm_rl.weight_transfer.sender import received
from dllm_rl.workers.offload import Offloader
from dllm_rl.workers.packing import PackedTrajectories, pack, unpack

TRAIN, EVALUATE = "train", "evaluate"
Role = str | Mapping[str, Any]  # or an expert's strategy: its name and options
NOTHING = WeightsVersion(step=-1, digest="")
_PROBED = 8  # tokens of the fixed sequence whose logits show whether an adapter arrives


class EngineWorker:
    """Engines over one denoiser, one per role."""

    def __init__(
        self,
        config: Config,
        denoiser: TransformersDenoiser,
        strategies: Mapping[str, UnmaskingStrategy],
        vocabulary: str,
        parameters: Mapping[str, Tensor],
        place: WorkerRank,
        *,
        packed: bool,
    ) -> None:
        """Make the engines.

        Args:
            config: of the run.
            denoiser: the network; in one process the learner's own.
            strategies: of the roles "train" and "evaluate".
            vocabulary: digest of the model's vocabulary, for experts with a learned strategy.
            parameters: what learners send, by their names.
            place: of this engine.
            packed: answer with parcels, for the way to another process.
        """
        kind = engine_class(config.engine.name)
        self._make = functools.partial(kind, denoiser, max_batch_tokens=config.engine.max_batch_tokens)
        self._denoiser, self._vocabulary, self._place, self._packed = denoiser, vocabulary, place, packed
        self._weights = NOTHING
        self._engines: dict[str, Any] = {
            role: self._make(strategy, weights=NOTHING) for role, strategy in strategies.items()
        }
        self._receiver = WeightReceiver(parameters, f"engine {place.rank}")
        self._sleeper: Offloader | None = None
        self._layout: Layout = ()
        self._broadcast: Broadcast | None = None

    @property
    def ticks(self) -> int:
        """Forwards so far; a sign of life."""
        return self._denoiser.forwards

    def generate(
        self,
        role: Role,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        samples_per_prompt: int,
        partial: PackedTrajectories | None = None,
        max_blocks: int | None = None,
    ) -> list[Trajectory] | PackedTrajectories:
        """Decode; see protocols.RolloutEngine.

        Raises:
            RunStopped: the weights are not those of one version, or not there.
        """
        if not self._receiver.complete:
            raise RunStopped(f"engine {self._place.rank} holds an unfinished push of weights and decodes nothing")
        if self._sleeper is not None and self._sleeper.asleep:
            raise RunStopped(f"engine {self._place.rank} is asleep and decodes nothing")
        engine: RolloutEngine = self._engines[role] if isinstance(role, str) else self._expert(role)
        found = engine.generate(
            prompts,
            sampling,
            seed=seed,
            samples_per_prompt=samples_per_prompt,
            partial=None if partial is None else unpack(partial),
            max_blocks=max_blocks,
        )
        return pack(found) if self._packed else found

    def activate(self, weights: WeightsVersion) -> None:
        """The driver has verified the weights: these they are."""
        self._receiver.accept()
        self._weights = weights
        for engine in self._engines.values():
            engine.weights = weights

    def join(self, address: tuple[str, int], size: int, timeout_s: float) -> None:
        """Enter the process group of the learners' rank 0, behind it and the engines before this one."""
        self._broadcast = Broadcast(
            address,
            rank=self._place.rank + 1,
            size=size,
            host=self._place.host,
            device=self._denoiser.device,
            timeout_s=timeout_s,
        )

    def begin(self, step: int, layout: Sequence[Sequence[TensorSpec]], *, allow_older: bool) -> None:
        """See WeightReceiver."""
        self._receiver.begin(step, layout, allow_older=allow_older)
        self._layout = layout

    def write(self, number: int, payload: Any) -> None:
        """Take a bucket: from the process group if there is no payload, else from where the payload says."""
        if payload is None:
            assert self._broadcast is not None, "join() comes first"
            buffer = torch.empty(size_of(self._layout[number]), dtype=torch.uint8, device=self._denoiser.device)
            self._broadcast(buffer)
        else:
            buffer = received(payload, self._denoiser.device)
        self._receiver.write(number, buffer)

    def commit(self, step: int) -> dict[str, int]:
        """See WeightReceiver."""
        return self._receiver.commit(step)

    def sleep(self) -> None:
        """See Offloader; made when first needed, because it holds on to the memory that weights have at the time."""
        if self._sleeper is None:
            self._sleeper = Offloader(parameter.data for parameter in self._denoiser.module.parameters())
        self._sleeper.sleep()

    def wake(self) -> None:
        """See Offloader."""
        if self._sleeper is not None:
            self._sleeper.wake()

    def probe(self) -> Tensor:
        """(8, V) float32 logits of a fixed sequence with every token after the first masked."""
        denoiser = self._denoiser
        tokens = torch.full((1, min(_PROBED, denoiser.max_length)), denoiser.mask_id, device=denoiser.device)
        tokens[0, 0] = denoiser.eos_id
        valid = torch.ones_like(tokens, dtype=torch.bool)
        block_ids = None
        if denoiser.block_size is not None:
            start = torch.ones(1, dtype=torch.int64)
            block_ids = block_index(start, tokens.shape[1], denoiser.block_size, denoiser.block_origin).to(
                tokens.device
            )
        training = denoiser.module.training
        denoiser.module.eval()
        with torch.no_grad():
            states = denoiser.hidden_states(tokens, tokens == denoiser.mask_id, valid, block_ids)
            logits = denoiser.unembed(states[0]).float().cpu()
        denoiser.module.train(training)
        return logits

    def _expert(self, plugin: Mapping[str, Any]) -> RolloutEngine:
        chosen = Plugin.model_validate(plugin)
        strategy = build("strategies", chosen.name, chosen.options)
        strategy.bind(self._vocabulary, self._denoiser.device, trained_here=False)
        engine: RolloutEngine = self._make(strategy, weights=self._weights, keep_confidence=True)
        return engine
