"""A run looked at before it starts: what launch would refuse, its rows, bytes and hours."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dllm_rl.config.load import load_config, validate
from dllm_rl.config.plugins import configure
from dllm_rl.config.schema import Config
from dllm_rl.data.prompts import encode
from dllm_rl.driver.check_engine import check_engine
from dllm_rl.driver.choose import check_model, choose_parts, reward_plugins
from dllm_rl.driver.launch import WorkerSpec
from dllm_rl.driver.start_model import model_folder
from dllm_rl.errors import UserError
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.from_config import load_model, model_path
from dllm_rl.models.loading import checkpoint_folder
from dllm_rl.models.sources import base_of, is_adapter
from dllm_rl.models.teacher import load_teacher
from dllm_rl.planning.cards import Card
from dllm_rl.planning.memory import Memory, memory_of
from dllm_rl.planning.model import adapted, planned_model
from dllm_rl.planning.work import Shape, Work, work_of
from dllm_rl.reports.run_folder import read_rows
from dllm_rl.types import Prompt

_TOKENISED = 1000  # rows that lengths are looked at of; a run looks at all
Change = Mapping[str, Any]  # option -> value
PhaseOfWork = Literal["decoding", "scoring", "updating"]
PHASES_OF_WORK: Mapping[PhaseOfWork, str] = {"decoding": "rollout_s", "scoring": "score_s", "updating": "update_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the training rows look like to the model.

    Attributes:
        first: the first row, tokenised.
        limit: most tokens that a prompt may have.
        longest: of those that were looked at, tokens.
        mean: of the same.
        looked_at: how many.
        rows: of the task.
    """

    first: Prompt
    limit: int
    longest: int
    mean: float
    looked_at: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run comes to.

    Attributes:
        config: of the run.
        family: of its model.
        shape: of its model.
        parameters: of its model, without adapters.
        matches: target of the adapter -> (modules, trained parameters); None without an adapter.
        prompts: of its data.
        memory: of its devices.
        work: floating-point operations.
    """

    config: Config
    family: str
    shape: Shape
    parameters: int
    matches: Mapping[str, tuple[int, int]] | None
    prompts: Prompts
    memory: Memory
    work: Work


def plan_run(config: Config, card: Card) -> tuple[Plan, TransformersDenoiser]:
    """Plan a run as launch would check it, without weights.

    Args:
        config: of the run.
        card: its devices.
    Returns:
        the plan, and the model on the meta device, for remedies().
    Raises:
        UserError: what launch would refuse, in one line.
    """
    denoiser, prompts = look_at(config)
    if config.model.quantize is not None and card.kind != "cuda":
        raise UserError(f"model.quantize = {config.model.quantize} needs a GPU; name one with --card rtx4090-24gb, say")
    return plan_of(config, denoiser, prompts, card), denoiser


def look_at(config: Config) -> tuple[TransformersDenoiser, Prompts]:
    """A run's model on the meta device and its tokenised rows.

    Args:
        config: of the run.
    Raises:
        UserError: what launch would refuse, in one line.
    """
    parts = choose_parts(config)
    with tempfile.TemporaryDirectory() as scratch:  # a model made from scratch is not kept
        path = config.model.path
        if path is None:
            path = model_path(config, Path(scratch), parts.task, parts.train_examples)
        else:
            path = model_folder(path)
            path = base_of(path) if is_adapter(path) else path
        if not Path(path).exists():
            path = str(checkpoint_folder(path, config.model.revision, weights=False))
        denoiser, tokenizer = load_model(config, path, weights=False)
    spec = WorkerSpec(config=config, path=path, folder=Path(scratch), sampling=parts.sampling)
    check_engine(config, parts.algorithm, denoiser, spec.engine_capabilities, parts.sampling)
    limit = check_model(config, parts.sampling, denoiser)
    if config.model.teacher is not None and Path(config.model.teacher.path).exists():  # else it would be downloaded
        load_teacher(config, denoiser, tokenizer, weights=False)
    for reward in reward_plugins(config, parts.task):
        configure("rewards", reward.name, reward.options)
    system, traces = config.data.system_prompt, parts.algorithm.needs.traces
    if not parts.train_examples:
        raise UserError(f"task '{config.data.task.name}' has no training rows")
    some = [
        encode(example, tokenizer, max_prompt_tokens=limit, system_prompt=system, with_trace=traces)
        for example in parts.train_examples[:_TOKENISED]
    ]
    sizes = [len(prompt.token_ids) for prompt in some]
    return denoiser, Prompts(
        first=some[0],
        limit=limit,
        longest=max(sizes),
        mean=sum(sizes) / len(sizes),
        looked_at=len(some),
        rows=len(parts.train_examples),
    )


def plan_of(config: Config, denoiser: TransformersDenoiser, prompts: Prompts, card: Card) -> Plan:
    """Plan a run of a model and prompts that are known.

    Args:
        config: of the run.
        denoiser: its model on the meta device, without an adapter.
        prompts: of its data.
        card: its devices.
    """
    shape = Shape.of(denoiser)
    return Plan(
        config=config,
        family=denoiser.family.name,
        shape=shape,
        parameters=sum(p.numel() for p in denoiser.module.parameters()),
        matches=None if config.model.lora is None else adapted(planned_model(denoiser, config)),
        prompts=prompts,
        memory=memory_of(config, denoiser, prompts.longest, device=card.kind),
        work=work_of(config, shape, round(prompts.mean)),
    )


def speeds_of(run: Path) -> dict[str, float]:
    """Floating-point operations per second and device of each phase of a run, from its records.

    Args:
        run: its folder.
    Raises:
        UserError: no run folder, or one without a finished step.
    """
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        raise UserError(f"--like {run}: is not a run folder; it has no config.yaml and metrics.jsonl")
    config = load_config(run / "config.yaml")
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get("step_s") and "loss" in row]
    rows = rows[1:] or rows  # the first step warms up
    if not rows:
        raise UserError(f"--like {run}: no finished step in its metrics.jsonl")
    if config.model.path is None:
        made = {"path": str(run / "initial"), "init": None}
        config = config.model_copy(update={"model": config.model.model_copy(update=made)})
    denoiser, prompts = look_at(config)
    work = work_of(config, Shape.of(denoiser), round(prompts.mean))
    found: dict[str, float] = {}
    for phase, metric in PHASES_OF_WORK.items():
        seconds = sum(row.get(metric, 0.0) for row in rows) / len(rows)
        operations = getattr(work, phase) / work.steps
        if seconds > 0 and operations > 0:
            found[phase] = operations / seconds / _devices(config, phase)
    if not found:
        raise UserError(f"--like {run}: its records have no time of a phase that scores with the model")
    return found


def seconds_of(plan: Plan, speeds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase of a step; phases without a speed take the slowest that is known."""
    return {
        phase: getattr(plan.work, phase)
        / plan.work.steps
        / (speeds.get(phase) or min(speeds.values()))
        / _devices(plan.config, phase)
        for phase in PHASES_OF_WORK
    }


def remedies(plan: Plan, denoiser: TransformersDenoiser, card: Card) -> list[tuple[Change, int]]:
    """Single changes and the bytes of the fullest device with each of them; those that help alone, the best first.

    Args:
        plan: of a run.
        denoiser: its model on the meta device.
        card: its devices.
    """
    found: list[tuple[Change, int]] = []
    for change in _changes(plan):
        try:
            changed = _with(plan.config, change)
        except UserError:  # it does not go with another option
            continue
        peak = memory_of(changed, denoiser, plan.prompts.longest, device=card.kind).peak
        if peak < 0.98 * plan.memory.peak:
            found.append((change, peak))
    return sorted(found, key=lambda one: one[1])


def _changes(plan: Plan) -> Iterator[Change]:
    """What could help, as overrides of the command line."""
    config, rows = plan.config, plan.memory.batch
    model, learner, cluster = config.model, config.learner, config.cluster
    ray, deepspeed = cluster.kind == "ray", learner.backend == "deepspeed"
    if not model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    if rows.micro.number > 1:
        yield {"learner.tokens_per_microbatch": max(1, rows.micro.number // 4) * rows.length}
    if config.engine.name == "native" and rows.decoded.number > 1:
        yield {"engine.max_batch_tokens": max(1, rows.decoded.number // 4) * rows.length}
    if model.dtype == "float32" and plan.memory.cuda:
        yield {"model.dtype": "bfloat16"}
    if model.lora is None:
        yield {"model.lora": {"rank": 16, "alpha": 32.0}}
    else:
        if model.lora.rank > 16:
            yield {"model.lora.rank": max(16, model.lora.rank // 4)}
        if model.quantize is None and plan.memory.cuda:
            yield {"model.quantize": "nf4"}
    if not deepspeed and model.dtype == "bfloat16" and model.lora is None and learner.master_weights == "float32":
        yield {"learner.master_weights": "stochastic_rounding"}
    if deepspeed and not learner.offload_optimizer:
        yield {"learner.offload_optimizer": True}
    if deepspeed and ray and learner.zero_stage < 3:
        yield {"learner.zero_stage": 3}
    if ray and cluster.colocate and cluster.sleep is False:
        yield {"cluster.sleep": True}
    if ray and cluster.colocate:
        yield {"cluster.colocate": False}


def _with(config: Config, change: Change) -> Config:
    values = config.model_dump(exclude={"provenance"})
    for key, value in change.items():
        *parents, last = key.split(".")
        section = values
        for part in parents:
            section = section[part]
        section[last] = value
    return validate(values)


def _devices(config: Config, phase: PhaseOfWork) -> int:
    """How many share the work of a phase."""
    return config.cluster.engines if phase == "decoding" else config.cluster.learners
