"""Engines and learners of a run, made in this process or on a Ray cluster."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_rl import registry
from dllm_rl.cluster.group import WorkerGroup, WorkerRank, gather
from dllm_rl.cluster.local_group import LocalWorkerGroup
from dllm_rl.config.plugins import build, engine_class, plugin_class
from dllm_rl.config.schema import Config
from dllm_rl.config.section import Plugin
from dllm_rl.driver.check_engine import check_engine
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.driver.weight_sync import DistributedWeightSync, InProcessWeightSync, WeightSync
from dllm_rl.errors import UserError, require_package
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.from_config import load_model
from dllm_rl.models.teacher import load_teacher
from dllm_rl.models.tokenizers import vocabulary_digest
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.engine import EVALUATE, TRAIN, Capabilities, EngineSetup, RolloutEngine, SharedModel
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import Sampling
from dllm_rl.workers.engine_worker import EngineWorker
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

    @property
    def strategies(self) -> dict[str, Plugin]:
        """Unmasking strategies by role; evaluation has one only if the configuration names another."""
        found = {TRAIN: self.config.sampling.strategy}
        if self.config.evaluate.strategy is not None:
            found[EVALUATE] = self.config.evaluate.strategy
        return found

    @property
    def engine_capabilities(self) -> Capabilities:
        """What the engine of the configuration can do."""
        name = self.config.engine.name
        kind, options = engine_class(name, self.config.engine.options)
        with registry.plugin_boundary("engines", name, "capabilities()", kind.__module__):
            found: Capabilities = kind.capabilities(options)
        return found


def launch_local(spec: WorkerSpec, stack: ExitStack) -> Workers:
    """One engine and one learner in this process; an engine of ours decodes with the learner's own weights.

    Args:
        spec: what to build.
        stack: closes them.
    """
    config, algorithm = spec.config, spec.algorithm
    denoiser, tokenizer = load_model(config, spec.path)
    check_engine(config, algorithm, denoiser, spec.engine_capabilities, spec.sampling)
    chosen = _bound_strategies(spec, vocabulary_digest(tokenizer), denoiser.device)
    shared = SharedModel(denoiser=denoiser, tokenizer=tokenizer, strategies=chosen)

    def learner_worker(rank: WorkerRank) -> LearnerWorker:
        learner = make_learner(config, spec.folder, algorithm, chosen[TRAIN], denoiser, tokenizer, spec.sampling, rank)
        return LearnerWorker(learner, rank, denoiser, merged=config.cluster.push == "merged")

    learners = LocalWorkerGroup("learner", learner_worker)
    engines = LocalWorkerGroup("engine", lambda rank: EngineWorker(_engine(spec, rank, shared), rank, packed=False))
    stack.callback(engines.close)
    transport = None if engines.call(EngineWorker.shares_weights) == [True] else _local_transport(config)
    return _workers(config, (denoiser, tokenizer), learners, engines, transport=transport, log=lambda text: None)


def _local_transport(config: Config) -> str:
    name = config.cluster.transport
    if name == "auto":
        return "in_process"
    way = plugin_class("transports", name)
    with registry.plugin_boundary("transports", name, "unavailable()", way.__module__):
        why = "it works between processes" if way.collective else way.unavailable()
    if why:
        raise UserError(f"cluster.transport = {name} with cluster.kind: local: {why}; set cluster.transport: auto")
    return name


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
    from dllm_rl.cluster.placement import Placement, ResourceRequest
    from dllm_rl.cluster.ray_group import RayWorkerGroup

    config, cluster = spec.config, spec.config.cluster
    denoiser, tokenizer = load_model(config, spec.path, weights=False)
    check_engine(config, spec.algorithm, denoiser, spec.engine_capabilities, spec.sampling)
    load_teacher(config, denoiser, tokenizer, weights=False)  # refused here rather than by an actor
    wanted = cluster.engines * cluster.cpus_per_engine + cluster.learners * cluster.cpus_per_learner
    watch = stack.enter_context(ray_connection(cluster.address, cluster.namespace, wanted))
    default = (0.5 if cluster.colocate else 1.0) if cluster_has_gpus() else 0.0
    engine_gpus = default if cluster.gpus_per_engine is None else cluster.gpus_per_engine
    learner_gpus = default if cluster.gpus_per_learner is None else cluster.gpus_per_learner
    placement = Placement.reserve(
        ResourceRequest(count=cluster.engines, cpus=cluster.cpus_per_engine, gpus=engine_gpus),
        ResourceRequest(count=cluster.learners, cpus=cluster.cpus_per_learner, gpus=learner_gpus),
        colocate=cluster.colocate,
        wait_s=cluster.wait_s,
        log=log,
    )
    stack.callback(watch.unless_lost, placement.close)
    environment = _environment(config, cluster.cpus_per_learner)
    learners = RayWorkerGroup(
        "learner", functools.partial(_learner_actor, spec), placement.learners, environment, watch
    )
    stack.callback(learners.close)
    environment = _environment(config, cluster.cpus_per_engine)
    engines = RayWorkerGroup("engine", functools.partial(_engine_actor, spec), placement.engines, environment, watch)
    stack.callback(engines.close)
    with ThreadPoolExecutor(2) as both:  # importing and loading takes each of them as long
        gather([both.submit(group.restart, range(group.size)) for group in (learners, engines)])
    sleeps = cluster.sleep
    if sleeps is None:
        can_sleep = spec.engine_capabilities.sleep
        sleeps = can_sleep and cluster.colocate and engine_gpus > 0 and not config.rollout.max_staleness
    transport = "broadcast"
    if cluster.transport != "auto":
        transport = cluster.transport
    elif learner_gpus and cluster.colocate:
        transport = "cuda_ipc" if cluster.engines <= cluster.learners else "object_store"
    return _workers(config, (denoiser, tokenizer), learners, engines, transport=transport, sleeps=sleeps, log=log)


def _workers(
    config: Config,
    model: tuple[TransformersDenoiser, Any],
    learners: WorkerGroup[LearnerWorker],
    engines: WorkerGroup[EngineWorker],
    *,
    transport: str | None,
    sleeps: bool = False,
    log: Callable[[str], None],
) -> Workers:
    """The driver's view of both groups; without a transport they hold the same tensors."""
    cluster, (denoiser, tokenizer) = config.cluster, model
    learner = LearnerGroup(
        learners,
        minibatches=config.learner.minibatches,
        hang_s=cluster.hang_s,
        max_restarts=cluster.max_restarts,
    )
    pool = EnginePool(
        engines,
        rows_per_call=config.rollout.rows_per_call,
        hang_s=cluster.hang_s,
        max_restarts=cluster.max_restarts,
        sleeps=sleeps,
        log=log,
    )
    weights: WeightSync = InProcessWeightSync(learner, pool)
    if transport is not None:
        weights = DistributedWeightSync(
            learner,
            pool,
            transport=transport,
            bucket_bytes=cluster.bucket_mb << 20,
            timeout_s=cluster.push_timeout_s,
            keep=cluster.kind == "ray" and config.rollout.max_staleness > 0,
            log=log,
        )
    return Workers(denoiser=denoiser, tokenizer=tokenizer, learner=learner, engines=pool, weights=weights)


def _environment(config: Config, cpus: float) -> Mapping[str, str]:
    return {
        "OMP_NUM_THREADS": str(config.run.threads or max(1, int(cpus))),
        "TOKENIZERS_PARALLELISM": "false",
        # Plugins of a folder that only this process was told of are found there too.
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }


def _learner_actor(spec: WorkerSpec, rank: WorkerRank) -> LearnerWorker:
    config = spec.config
    _use_threads(config)
    denoiser, tokenizer = load_model(config, spec.path)
    strategy = _bound_strategies(spec, vocabulary_digest(tokenizer), denoiser.device)[TRAIN]
    learner = make_learner(config, spec.folder, spec.algorithm, strategy, denoiser, tokenizer, spec.sampling, rank)
    cluster = config.cluster
    return LearnerWorker(learner, rank, denoiser, merged=cluster.push == "merged", shares=cluster.colocate)


def _engine_actor(spec: WorkerSpec, rank: WorkerRank) -> EngineWorker:
    _use_threads(spec.config)
    return EngineWorker(_engine(spec, rank, shared=None), rank, packed=True)


def _engine(spec: WorkerSpec, rank: WorkerRank, shared: SharedModel | None) -> RolloutEngine:
    config = spec.config
    kind, options = engine_class(config.engine.name, config.engine.options)
    setup = EngineSetup(
        rank=rank.rank,
        path=spec.path,
        strategies={role: plugin.model_dump() for role, plugin in spec.strategies.items()},
        trains=spec.algorithm.needs.trains,
        load=functools.partial(load_model, config, spec.path, adapter=config.cluster.push == "adapter"),
        shared=shared,
    )
    engine: RolloutEngine = kind(options, setup)
    return engine


def _bound_strategies(spec: WorkerSpec, vocabulary: str, device: torch.device) -> dict[str, UnmaskingStrategy]:
    trains_policy, made = "policy" in spec.algorithm.needs.trains, {}
    for role, plugin in spec.strategies.items():
        made[role] = build("strategies", plugin.name, plugin.options)
        made[role].bind(vocabulary, device, trained_here=trains_policy and role == TRAIN)
    return made


def _use_threads(config: Config) -> None:
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
