"""Sections that say where engines and learners run, and what they may do at the same time."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dllm_rl.config.section import Plugin, Section
from dllm_rl.errors import UserError


class RolloutSection(Section):
    """What a sample is, and how far decoding may be ahead of learning."""

    rollouter: Plugin = Plugin(name="single_turn")
    """Makes the samples of a prompt: one completion each, or episodes of several turns."""
    max_staleness: int = Field(default=0, ge=0)
    """Optimiser steps by which the weights that decode a batch may be older than those that learn from it; 0 = strictly
    on-policy; from 1 on, decoding and learning run at the same time (cluster.kind: ray)."""
    pause_blocks: int | None = Field(default=None, ge=1)
    """Decoding blocks after which completions pause if new weights are there, to go on with them; runs then depend on
    who is faster. null = new weights wait until the batches are decoded, and runs are reproducible."""
    rows_per_call: int = Field(default=64, ge=1)
    """Completions per piece of work; the same pieces for any number of engines, so that results do not depend on it."""
    correction: Literal["token", "sequence"] | None = None
    """Truncated importance weights, per token or per completion, for rollouts of older weights or of engines whose
    log-probabilities are approximate; costs a replay of the rollout."""
    correction_cap: float = Field(default=2.0, gt=0)
    """Largest such weight."""


class ClusterSection(Section):
    """Where engines and learners run."""

    kind: Literal["local", "ray"] = "local"
    """"local": all in this process; "ray": one Ray actor each."""
    address: str | None = None
    """Of a running Ray cluster ("auto", "host:port", "ray://host:port"); "local" = a private one on this machine; null
    = RAY_ADDRESS if it is set, else "local"."""
    namespace: str = "dllm-rl"
    """Ray namespace of the run."""
    engines: int = Field(default=1, ge=1)
    """Rollout engines."""
    learners: int = Field(default=1, ge=1)
    """Learner ranks; more than one needs learner.backend: deepspeed."""
    colocate: bool = False
    """Engine i and learner i on the same device."""
    sleep: bool | None = None
    """While learners work, colocated engines keep their weights in host memory; null = on GPUs, unless decoding and
    learning overlap."""
    cpus_per_engine: float = Field(default=1.0, ge=0)
    """CPUs of each engine."""
    cpus_per_learner: float = Field(default=1.0, ge=0)
    """CPUs of each learner rank."""
    gpus_per_engine: float | None = Field(default=None, ge=0)
    """GPUs of each engine; null = 1 where the cluster has GPUs (0.5 with colocate), else 0."""
    gpus_per_learner: float | None = Field(default=None, ge=0)
    """GPUs of each learner rank; null = as for engines."""
    wait_s: float = Field(default=600.0, gt=0)
    """How long to wait for free resources."""
    transport: str = "auto"
    """How weights travel: "broadcast" (NCCL or gloo), "object_store" (Ray's), "cuda_ipc" (on a shared device), or a
    transport of your own; "auto" chooses one of these."""
    push: Literal["adapter", "merged"] = "adapter"
    """With LoRA: send the adapter, or the adapted layers with it merged in, for engines that know no adapters."""
    bucket_mb: int = Field(default=256, ge=1)
    """Largest piece of a push, MB."""
    push_timeout_s: float = Field(default=300.0, gt=0)
    """Deadline of each step of a push."""
    hang_s: float = Field(default=600.0, gt=0)
    """An engine or learner that has work and makes no forward for so long is ended and built anew."""
    max_restarts: int = Field(default=3, ge=0)
    """How many engines, and how often the learners, may be lost over the run; then it saves and stops."""


class ReferenceSection(Section):
    """The reference policy of algorithms that need one: what a divergence or a preference is measured from."""

    kind: Literal["frozen", "ema"] = "frozen"
    """"frozen": the model at the start of the run; "ema": it follows the policy by an exponential moving average of
    weights."""
    every: int = Field(default=64, ge=1)
    """Optimiser updates from one move to the next; a step has updates_per_step times minibatches of them."""
    weight: float = Field(default=0.6, gt=0, le=1)
    """Of the policy: each move makes the reference weight * policy + (1 - weight) * reference; 1 = a copy."""


class LearnerSection(Section):
    """How weights are updated."""

    backend: Literal["torch", "deepspeed"] = "torch"
    """"torch" for one process, "deepspeed" for any number of ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over ranks: 1 optimiser states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimiser states in host memory (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep parameters in host memory (ZeRO 3)."""
    zero_options: dict[str, Any] = Field(default={})
    """Further keys of DeepSpeed's zero_optimization section, e.g. stage3_prefetch_bucket_size."""
    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    value_lr: float = Field(default=5e-6, gt=0)
    """Peak learning rate of a value model, for algorithms that train one."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """The same as a share of run.steps, rounded up; null = warmup_steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the decay ends, as a share of lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    master_weights: Literal["float32", "stochastic_rounding"] = "float32"
    """Behind parameters in bfloat16: "float32" copies that AdamW steps on, or none and rounding at random, which saves
    4 bytes per parameter and is noisier (learner.backend: torch)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; not applied to vectors (norms, biases)."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm; null = no clipping."""
    updates_per_step: int = Field(default=1, ge=1)
    """Passes over each batch of rollouts (mu), of one optimiser update per minibatch; step counts batches."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser updates in a pass over a batch of rollouts; the old policy is scored for the whole batch before the
    first, so that ratios differ from 1 in the others. Groups stay whole."""
    reference: ReferenceSection = ReferenceSection()
    """The reference policy."""
    precompute_reference: bool = False
    """Score all steps under the reference before training and free it; for pairs and demonstrations."""
    reference_cache: str | None = None
    """Folder of precomputed scores, shared by runs over the same data and seed; null = inside the run folder."""
    tokens_per_microbatch: int = Field(default=1 << 14, ge=1)
    """Padded tokens per forward; the loss does not depend on it."""

    @model_validator(mode="after")
    def _decay_rates(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas = {list(self.betas)}: each must be at least 0 and below 1, such as [0.9, 0.999]")
        return self


def check(cluster: ClusterSection, rollout: RolloutSection, learner: LearnerSection, *, quantized: bool) -> None:
    """Refuse what cannot work together.

    Args:
        cluster: where engines and learners run.
        rollout: how far decoding is ahead.
        learner: how weights are updated.
        quantized: the model holds frozen weights in 4 bits.
    Raises:
        UserError: in one line.
    """
    deepspeed = learner.backend == "deepspeed"
    if cluster.kind == "local" and (cluster.engines, cluster.learners) != (1, 1):
        raise UserError(
            f"cluster.engines = {cluster.engines} and cluster.learners = {cluster.learners} need cluster.kind: "
            f"ray; cluster.kind: local is one process with one of each"
        )
    if rollout.pause_blocks is not None and (cluster.kind == "local" or not rollout.max_staleness):
        raise UserError(
            f"rollout.pause_blocks = {rollout.pause_blocks}: only what is decoded while the learner works can "
            f"pause; set cluster.kind: ray and rollout.max_staleness: 1 or more"
        )
    if cluster.sleep and (not cluster.colocate or cluster.kind == "local" or rollout.max_staleness):
        raise UserError(
            "cluster.sleep: true lets engines make room for learners that have the same device and work at another "
            "time; it needs cluster.kind: ray, cluster.colocate: true and rollout.max_staleness: 0"
        )
    if quantized and cluster.push == "merged":
        raise UserError(
            "cluster.push: merged sends adapted layers whole, model.quantize keeps them in 4 bits; set "
            "cluster.push: adapter"
        )
    if quantized and deepspeed and learner.zero_stage == 3:
        raise UserError(
            "learner.zero_stage = 3 shards every parameter and cannot shard 4-bit ones (model.quantize); set "
            "learner.zero_stage: 2"
        )
    if cluster.learners > 1 and not deepspeed:
        raise UserError(f"cluster.learners = {cluster.learners} needs learner.backend: deepspeed")
    if cluster.kind == "local" and deepspeed and learner.zero_stage == 3:
        raise UserError(
            "learner.zero_stage = 3 takes the weights apart that an engine in the same process decodes with; set "
            "cluster.kind: ray, or learner.zero_stage: 2"
        )
    ours = sorted(learner.zero_options.keys() & {"stage", "offload_optimizer", "offload_param"})
    if ours:
        raise UserError(
            f"learner.zero_options: '{ours[0]}' has an option of its own; set learner.zero_stage, "
            f"offload_optimizer or offload_parameters"
        )
    moves, default = learner.reference, ReferenceSection()
    if moves.kind == "ema" and learner.precompute_reference:
        raise UserError(
            "learner.precompute_reference scores all steps under a reference that does not move; leave it out, or set "
            "learner.reference.kind: frozen"
        )
    if moves.kind == "frozen" and (moves.every, moves.weight) != (default.every, default.weight):
        raise UserError(
            f"learner.reference: every = {moves.every} and weight = {moves.weight} say how a reference moves, and this "
            f"one is frozen; add kind: ema"
        )
    if learner.warmup_ratio is not None and learner.warmup_steps:
        raise UserError("learner.warmup_steps and learner.warmup_ratio say the same thing; give one of them")
    if learner.master_weights == "stochastic_rounding" and deepspeed:
        raise UserError(
            "learner.master_weights: stochastic_rounding needs learner.backend: torch; DeepSpeed keeps float32"
        )
    if learner.zero_options and not deepspeed:
        raise UserError("learner.zero_options needs learner.backend: deepspeed")
    offloads = learner.offload_optimizer or learner.offload_parameters
    if offloads and not deepspeed:
        raise UserError("learner.offload_optimizer and offload_parameters need learner.backend: deepspeed")
    if learner.offload_parameters and learner.zero_stage < 3:
        raise UserError(f"learner.offload_parameters needs learner.zero_stage: 3, it is {learner.zero_stage}")
    if learner.offload_optimizer and learner.zero_stage < 1:
        raise UserError("learner.offload_optimizer needs learner.zero_stage: 1 or more")
