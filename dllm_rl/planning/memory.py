"""Bytes of each device in each phase of a step: what is exact arithmetic, and what a dry run gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peft.tuners.lora import LoraLayer

from dllm_rl import registry
from dllm_rl.config.plugins import build, engine_class
from dllm_rl.config.schema import Config
from dllm_rl.diffusion.likelihood import CHUNK_ELEMENTS
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.planning.batch import Batch, batch_of
from dllm_rl.planning.dry_run import DryRun, head_width
from dllm_rl.planning.model import States, cache_bytes, frozen_layers, planned_model, states_of, weight_bytes
from dllm_rl.planning.work import Shape, sampling_of
from dllm_rl.protocols.algorithm import Algorithm

Phase = Literal["rollout", "scoring", "update", "step"]
PHASES: tuple[Phase, ...] = ("rollout", "scoring", "update", "step")
ALWAYS = frozenset(PHASES)
_CUDA_CONTEXT = 600 << 20  # of a process: context, kernels, workspaces of cuBLAS; an allowance, not computed
_BUCKET, _GATHERED = 500_000_000, 1_000_000_000  # DeepSpeed's defaults, elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Something that takes memory.

    Attributes:
        name: what it is.
        bytes: how many.
        phases: when it is there.
    """

    name: str
    bytes: int
    phases: frozenset[Phase] = ALWAYS


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device, or one of several that hold the same.

    Attributes:
        name: what runs on it.
        count: how many there are.
        terms: what it holds.
        host: what its processes hold in host memory instead.
    """

    name: str
    count: int
    terms: Sequence[Term]
    host: Sequence[Term] = ()

    def of(self, phase: Phase) -> int:
        """Bytes of a phase."""
        return sum(term.bytes for term in self.terms if phase in term.phases)

    @property
    def worst(self) -> Phase:
        """The phase with the most bytes."""
        return max(PHASES, key=self.of)

    @property
    def peak(self) -> int:
        """Its bytes."""
        return self.of(self.worst)

    def largest(self, phase: Phase) -> list[Term]:
        """Its terms, the largest first."""
        return sorted((t for t in self.terms if phase in t.phases and t.bytes), key=lambda term: -term.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a run needs.

    Attributes:
        devices: of different kinds.
        states: of a learner rank.
        batch: the rows that the phases are of.
        cuda: whether the devices are GPUs.
        store: bytes in Ray's object store, in host memory: weights that travel through it, or are kept there for
            engines that are built anew.
    """

    devices: Sequence[Device]
    states: States
    batch: Batch
    cuda: bool
    store: int

    @property
    def peak(self) -> int:
        """Bytes of the fullest device; of all processes on a CPU, where they share one memory."""
        peaks = [(device.peak, device.count) for device in self.devices]
        return max(peak for peak, _ in peaks) if self.cuda else sum(peak * count for peak, count in peaks)


def memory_of(config: Config, model: TransformersDenoiser, prompt_tokens: int, *, device: str) -> Memory:
    """What every device of a run holds.

    Args:
        config: of the run.
        model: of the run on the meta device, without an adapter.
        prompt_tokens: of the longest prompt.
        device: type of the devices, "cuda" or "cpu".
    """
    algorithm: Algorithm = build("algorithms", config.algorithm.name, config.algorithm.options)
    trains, ranks = "model" in algorithm.needs.trains, config.cluster.learners
    made = planned_model(model, config)
    batch = batch_of(config, Shape.of(made), prompt_tokens, module=made.module)
    states = states_of(made, config, trains=trains, ranks=ranks)
    learner, host = _learner(config, algorithm, made, states, batch, device=device)
    rollout = _rollout(config, algorithm, made, batch, prompt_tokens, device=device)
    own = _engine_weights(config, model, made)
    cluster = config.cluster
    context = [Term(name="CUDA context and libraries, about", bytes=_CUDA_CONTEXT)] if device == "cuda" else []
    if cluster.kind == "local":
        devices = [Device(name="learner and engine", count=1, terms=[*learner, *own, *rollout, *context], host=host)]
    elif cluster.colocate and device == "cuda":
        sleeps = cluster.sleep if cluster.sleep is not None else not config.rollout.max_staleness
        when = frozenset[Phase]({"rollout"}) if sleeps else ALWAYS
        own = [Term(name=term.name, bytes=term.bytes, phases=when) for term in own]
        context = [Term(name="two CUDA contexts and libraries, about", bytes=2 * _CUDA_CONTEXT)]
        terms = [*learner, *own, *rollout, *_push(config, states, ranks), *context]
        asleep = [Term(name=f"{t.name}, asleep", bytes=t.bytes) for t in own if sleeps]
        both = min(cluster.engines, ranks)
        devices = [Device(name="learner rank and engine", count=both, terms=terms, host=[*host, *asleep])]
        if ranks > both:
            devices.append(Device(name="learner rank", count=ranks - both, terms=[*learner, *context], host=host))
        if cluster.engines > both:
            left = cluster.engines - both
            devices.append(Device(name="engine", count=left, terms=[*own, *rollout, *context], host=asleep))
    else:
        push = _push(config, states, ranks)
        devices = [
            Device(name="learner rank", count=ranks, terms=[*learner, *push, *context], host=host),
            Device(name="engine", count=cluster.engines, terms=[*own, *rollout, *push, *context]),
        ]
    return Memory(
        devices=devices, states=states, batch=batch, cuda=device == "cuda", store=_store(config, made, states)
    )


def _learner(
    config: Config, algorithm: Algorithm, made: TransformersDenoiser, states: States, batch: Batch, *, device: str
) -> tuple[list[Term], list[Term]]:
    """Terms of a learner rank on its device and in host memory."""
    learner, zero = config.learner, config.learner.backend == "deepspeed"
    dry = DryRun(made, device=device)
    train = frozenset[Phase]({"update", "step"})
    away = [Term(name="AdamW's moments", bytes=states.moments), Term(name="float32 masters", bytes=states.masters)]
    weights, host = Term(name="weights", bytes=states.weights), []
    terms = [weights, *away]
    if zero and learner.offload_optimizer:
        terms, host = [weights], away
    if zero and learner.offload_parameters:
        terms, host = [], [weights, *away]
    terms += _reference(config, algorithm, made, states)
    if not states.trained:
        return terms, host
    peak = dry.update(batch.micro, passes=1 if batch.microbatches == 1 else 2, sums=not zero)
    scoring = dry.score(batch.micro).total
    held = states.gradients if zero else peak.gradients
    dtype = next(p for p in made.module.parameters() if p.requires_grad).itemsize
    if not zero and batch.microbatches == 1:  # gradients come while activations go; the two are not there at once
        terms.append(Term(name="gradients", bytes=states.gradients, phases=frozenset({"step"})))
        rest = peak.total - peak.kept
    else:
        terms.append(Term(name="gradients", bytes=held, phases=train))
        rest = peak.total - peak.kept - (0 if zero else peak.gradients)
    update = frozenset[Phase]({"update"})
    what = "activations, layers recomputed" if config.model.gradient_checkpointing else "activations"
    terms.append(Term(name=what, bytes=peak.kept, phases=update))
    terms.append(Term(name="logits chunk and temporaries", bytes=rest, phases=update))
    terms.append(Term(name="a forward without gradient", bytes=scoring, phases=frozenset({"scoring"})))
    if config.model.quantize is not None:
        terms.append(_unpacked(made, frozenset({"scoring", "update"})))
    if zero:
        bucket = int(learner.zero_options.get("reduce_bucket_size", _BUCKET)) * dtype
        sharded = learner.zero_stage == 3
        terms.append(Term(name="ZeRO's bucket of gradients", bytes=bucket * (2 if sharded else 1), phases=update))
        if sharded:
            most = int(learner.zero_options.get("stage3_max_live_parameters", _GATHERED))
            gathered = min(most * dtype, weight_bytes(made, quantized=False))
            terms.append(Term(name="ZeRO 3's gathered parameters, at most", bytes=gathered))
    elif device == "cpu":  # torch steps one parameter after the other there
        largest = max(p.numel() * max(4, p.itemsize) for p in made.module.parameters() if p.requires_grad)
        terms.append(Term(name="what AdamW needs meanwhile", bytes=2 * largest, phases=frozenset({"step"})))
    if algorithm.needs.values:
        copies = states.weights + states.masters + states.moments
        terms.append(Term(name="value model with its optimiser", bytes=copies))
        terms.append(Term(name="value model's gradients", bytes=states.gradients, phases=train))
    return terms, host


def _reference(config: Config, algorithm: Algorithm, made: TransformersDenoiser, states: States) -> list[Term]:
    needed = algorithm.needs.reference and not config.learner.precompute_reference
    if config.model.teacher is not None:
        return [Term(name="teacher, taken to be of the model's size", bytes=weight_bytes(made, quantized=False))]
    if config.model.lora is not None:
        return [Term(name="reference: a second adapter", bytes=states.second_adapter)] if needed else []
    return [Term(name="reference", bytes=weight_bytes(made, quantized=False))] if needed else []


def _rollout(
    config: Config,
    algorithm: Algorithm,
    made: TransformersDenoiser,
    batch: Batch,
    prompt_tokens: int,
    *,
    device: str,
) -> list[Term]:
    held_out = config.evaluate
    if algorithm.needs.source != "rollouts" and not (held_out.at_start or held_out.at_end or held_out.every_steps):
        return []
    when, blocks = frozenset[Phase]({"rollout"}), made.block_size is not None
    rows, canvas = batch.decoded, config.sampling.max_new_tokens
    context = prompt_tokens + canvas - batch.decoded.length if blocks else 0
    chunk = CHUNK_ELEMENTS // made.vocab_size
    peak = DryRun(made, device=device).decode(rows, sampling_of(config), chunk=chunk, context=context)
    terms = [Term(name="a forward of a rollout, and its proposals", bytes=peak.total, phases=when)]
    if blocks:
        settings, itemsize = made.module.config, made.module.get_input_embeddings().weight.itemsize
        size = (rows.number, prompt_tokens, canvas, rows.length)
        held = cache_bytes(settings, *size, itemsize, head_width(settings))
        terms.append(Term(name="keys and values", bytes=held, phases=when))
    if config.model.quantize is not None:
        terms.append(_unpacked(made, when))
    return terms


def _engine_weights(config: Config, model: TransformersDenoiser, made: TransformersDenoiser) -> list[Term]:
    """An engine's own copy of the weights; one of ours in the learner's process has none."""
    kind, _ = engine_class(config.engine.name, config.engine.options)
    if config.cluster.kind == "local" and registry.is_ours(kind.__module__):
        return []
    quantized, merged = config.model.quantize is not None, config.cluster.push == "merged"
    held = weight_bytes(model if merged else made, quantized=quantized)
    return [Term(name="engine's weights", bytes=held)]


def _push(config: Config, states: States, ranks: int) -> list[Term]:
    """Buckets, which engines and rank 0 hold between two steps; never beside activations."""
    bucket = min(config.cluster.bucket_mb << 20, states.weights * (ranks if config.learner.zero_stage == 3 else 1))
    return [Term(name="bucket of a push", bytes=bucket, phases=frozenset({"step"}))]


def _store(config: Config, made: TransformersDenoiser, states: States) -> int:
    cluster = config.cluster
    if cluster.kind == "local":
        return 0
    through = cluster.transport == "object_store" or (
        cluster.transport == "auto" and cluster.colocate and cluster.engines > cluster.learners
    )
    if not (through or config.rollout.max_staleness) or not states.trained:
        return 0
    whole = [p for p in made.module.parameters() if p.requires_grad]
    if config.model.lora is not None and cluster.push == "merged":
        whole = [layer.base_layer.weight for layer in made.module.modules() if isinstance(layer, LoraLayer)]
    return sum(p.numel() * p.itemsize for p in whole)


def _unpacked(made: TransformersDenoiser, phases: frozenset[Phase]) -> Term:
    """A 4-bit layer is unpacked for its product, in the dtype that it computes in."""
    largest = max(layer.weight.numel() * layer.weight.itemsize for layer in frozen_layers(made))
    return Term(name="a 4-bit layer, unpacked", bytes=largest, phases=phases)
