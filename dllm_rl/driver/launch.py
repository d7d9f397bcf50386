"""Engines and learners of a run, made in this process or on a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_rl.cluster.group import WorkerGroup, WorkerRank, gather
from dllm_rl.cluster.local_group import LocalWorkerGroup
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.driver.weight_sync import DistributedWeightSync, InProcessWeightSync, WeightSync
from dllm_rl.errors import require_package
from dllm_rl.learner.scorer import join_names
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.from_config import load_model
from dllm_rl.models.tokenizers import vocabulary_digest
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import Sampling
from dllm_rl.weight_transfer.sender import Transport
from dllm_rl.workers.engine_worker import EVALUATE, TRAIN, EngineWorker
from dllm_rl.workers.learner_worker import LearnerWorker, make_learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Who does the work.

    Attributes:
        denoiser: the model of this process; on a cluster without weights, for shapes and token ids.
        tokenizer: of the model.
        learner: all learner ranks.
        engines: all engines.
        weights: from the one to the others.
    """

    denoiser: TransformersDenoiser
    tokenizer: Any
    learner: LearnerGroup
    engines: EnginePool
    weights: WeightSync


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What every process needs in order to build its part; travels by pickle.

    Attributes:
        config: of the run.
        path: of the model, the same on every node.
        folder: the run folder, the same on every node.
        sampling: of training.
    """

    config: Config
    path: str
    folder: Path
    sampling: Sampling

    @property
    def algorithm(self) -> Algorithm:
        """A fresh instance of the method."""
        plugin = self.config.algorithm
        made: Algorithm = build("algorithms", plugin.name, plugin.options)
        return made


def strategies(
    config: Config, vocabulary: str, device: torch.device, *, trains_policy: bool
) -> dict[str, UnmaskingStrategy]:
    """The strategies of training and of evaluation, by role; one and the same if the configuration names one."""
    plugin, other = config.sampling.strategy, config.evaluate.strategy
    train = build("strategies", plugin.name, plugin.options)
    train.bind(vocabulary, device, trained_here=trains_policy)
    if other is None:
        return {TRAIN: train, EVALUATE: train}
    held_out = build("strategies", other.name, other.options)
    held_out.bind(vocabulary, device, trained_here=False)
    return {TRAIN: train, EVALUATE: held_out}


def launch_local(spec: WorkerSpec) -> Workers:
    """One engine and one learner in this process, over the same weights."""
    config, algorithm = spec.config, spec.algorithm
    denoiser, tokenizer = load_model(config, spec.path)
    vocabulary, trains_policy = vocabulary_digest(tokenizer), "policy" in algorithm.needs.trains
    chosen = strategies(config, vocabulary, denoiser.device, trains_policy=trains_policy)
    made: list[LearnerWorker] = []

    def learner_member(place: WorkerRank) -> LearnerWorker:
        learner = make_learner(config, spec.folder, algorithm, chosen[TRAIN], denoiser, tokenizer, spec.sampling, place)
        made.append(LearnerWorker(learner, place, denoiser))
        return made[-1]

    learners = LocalWorkerGroup("learner", learner_member)
    weights = dict(made[-1].learner.named_weights())
    engines = LocalWorkerGroup(
        "engine", lambda place: EngineWorker(config, denoiser, chosen, vocabulary, weights, place, packed=False)
    )
    learner, pool = _views(config, learners, engines, sleeps=False, log=lambda text: None)
    shared = InProcessWeightSync(learner, pool)
    shared.push()
    return Workers(denoiser=denoiser, tokenizer=tokenizer, learner=learner, engines=pool, weights=shared)


def launch_ray(spec: WorkerSpec, stack: ExitStack, log: Callable[[str], None]) -> Workers:
    """Actors on a Ray cluster.

    Args:
        spec: what to build.
        stack: closes them.
        log: told what is waited for.
    Raises:
        UserError: no cluster, or one that is too small.
    """
    require_package("ray", "ray", "cluster.kind: ray")
    from dllm_rl.cluster.connection import cluster_has_gpus, ray_connection
    from dllm_rl.cluster.placement import Needs, Placement
    from dllm_rl.cluster.ray_group import RayWorkerGroup

    config, cluster = spec.config, spec.config.cluster
    wanted = cluster.engines * cluster.cpus_per_engine + cluster.learners * cluster.cpus_per_learner
    stack.enter_context(ray_connection(cluster.address, cluster.namespace, wanted))
    default = (0.5 if cluster.colocate else 1.0) if cluster_has_gpus() else 0.0
    engine_gpus = default if cluster.gpus_per_engine is None else cluster.gpus_per_engine
    learner_gpus = default if cluster.gpus_per_learner is None else cluster.gpus_per_learner
    placement = Placement.reserve(
        Needs(count=cluster.engines, cpus=cluster.cpus_per_engine, gpus=engine_gpus),
        Needs(count=cluster.learners, cpus=cluster.cpus_per_learner, gpus=learner_gpus),
        colocate=cluster.colocate,
        wait_s=cluster.wait_s,
        log=log,
    )
    stack.callback(placement.close)
    denoiser, tokenizer = load_model(config, spec.path, weights=False)
    learners = RayWorkerGroup(
        "learner",
        functools.partial(_learner_actor, spec),
        placement.learners,
        _environment(config, cluster.cpus_per_learner),
    )
    stack.callback(learners.close)
    engines = RayWorkerGroup(
        "engine",
        functools.partial(_engine_actor, spec),
        placement.engines,
        _environment(config, cluster.cpus_per_engine),
    )
    stack.callback(engines.close)
    with ThreadPoolExecutor(2) as both:  # importing and loading takes each of them as long
        gather([both.submit(group.restart, range(group.size)) for group in (learners, engines)])
    sleeps = cluster.sleep
    if sleeps is None:
        sleeps = cluster.colocate and engine_gpus > 0 and not config.rollout.max_staleness
    learner, pool = _views(config, learners, engines, sleeps=sleeps, log=log)
    transport: Transport = "collective"
    if cluster.transport != "auto":
        transport = cluster.transport
    elif learner_gpus and cluster.colocate:
        transport = "cuda_ipc" if cluster.engines <= cluster.learners else "object_store"
    sync = DistributedWeightSync(
        learner,
        pool,
        transport=transport,
        bucket_bytes=cluster.bucket_mb << 20,
        timeout_s=cluster.push_timeout_s,
        keep=config.rollout.max_staleness > 0,
        log=log,
    )
    return Workers(denoiser=denoiser, tokenizer=tokenizer, learner=learner, engines=pool, weights=sync)


def _views(
    config: Config, learners: WorkerGroup, engines: WorkerGroup, *, sleeps: bool, log: Callable[[str], None]
) -> tuple[LearnerGroup, EnginePool]:
    cluster = config.cluster
    learner = LearnerGroup(learners, hang_s=cluster.hang_s, max_restarts=cluster.max_restarts)
    pool = EnginePool(
        engines,
        rows_per_call=config.engine.rows_per_call,
        hang_s=cluster.hang_s,
        max_restarts=cluster.max_restarts,
        sleeps=sleeps,
        log=log,
    )
    return learner, pool


def _environment(config: Config, cpus: float) -> Mapping[str, str]:
    return {"OMP_NUM_THREADS": str(config.run.threads or max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false"}


def _learner_actor(spec: WorkerSpec, place: WorkerRank) -> LearnerWorker:
    config = spec.config
    _use_threads(config)
    algorithm = spec.algorithm
    denoiser, tokenizer = load_model(config, spec.path)
    chosen = strategies(
        config, vocabulary_digest(tokenizer), denoiser.device, trains_policy="policy" in algorithm.needs.trains
    )
    learner = make_learner(config, spec.folder, algorithm, chosen[TRAIN], denoiser, tokenizer, spec.sampling, place)
    cluster = config.cluster
    return LearnerWorker(learner, place, denoiser, merged=cluster.push == "merged", shares=cluster.colocate)


def _engine_actor(spec: WorkerSpec, place: WorkerRank) -> EngineWorker:
    config = spec.config
    _use_threads(config)
    trains = spec.algorithm.needs.trains
    denoiser, tokenizer = load_model(config, spec.path, adapter=config.cluster.push == "adapter")
    denoiser.module.requires_grad_(False)
    vocabulary = vocabulary_digest(tokenizer)
    chosen = strategies(config, vocabulary, denoiser.device, trains_policy="policy" in trains)
    policy = chosen[TRAIN].policy if "policy" in trains else None
    model = denoiser.module.named_parameters() if "model" in trains else None
    named = join_names(model, None if policy is None else policy.named_parameters())
    weights = {name: parameter.data for name, parameter in named}
    return EngineWorker(config, denoiser, chosen, vocabulary, weights, place, packed=True)


def _use_threads(config: Config) -> None:
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
