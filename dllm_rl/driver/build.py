"""Builds the parts of a run from its configuration, refusing combinations that cannot work before anything starts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from dllm_rl import seeding
from dllm_rl.cluster.group import WorkerGroup
from dllm_rl.cluster.local_group import LocalWorkerGroup
from dllm_rl.config.schema import Config
from dllm_rl.data.prompts import encode
from dllm_rl.data.source import PromptSource
from dllm_rl.driver.choose import check_model, choose_parts, reward_plugins
from dllm_rl.driver.demonstrations import demonstrations, references
from dllm_rl.driver.launch import Workers, WorkerSpec, launch_local, launch_ray
from dllm_rl.driver.refused import forget_refused
from dllm_rl.driver.start_model import with_start_model
from dllm_rl.errors import UserError
from dllm_rl.evaluation.evaluate import Evaluation, Record, evaluate
from dllm_rl.models.from_config import model_path
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.engine import EVALUATE
from dllm_rl.protocols.rollouter import Rollouter
from dllm_rl.protocols.task import Task
from dllm_rl.reports.progress import Progress, each
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.process import Containment
from dllm_rl.types import Example, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Workers):
    """Everything that the training loop holds. A context manager: engines and learners end with it.

    Of its workers, engines decode, and the learner owns the trained weights, of the model or of the unmasking policy.

    Attributes:
        task: the task.
        algorithm: the method.
        rollouter: makes the samples that it learns from.
        reward_pool: reward workers, or None for supervised training on a task without rewards.
        source: prompts of each step.
        spare: prompts of each round of data.resample_flat_groups, in an order of their own.
        demonstrations: uid -> tokens of its completions, for algorithms that train on them: the reference completion,
            or the chosen and the rejected one.
        held_out: prompts for evaluation.
        references: uid -> tokens of the reference completions of held-out prompts, for the held-out loss of
            algorithms that train on demonstrations.
        sampling: decoding while training.
        eval_samplings: decoding of each held-out evaluation.
        closing: ends what was started.
    """

    task: Task
    algorithm: Algorithm
    rollouter: Rollouter
    reward_pool: RewardPool | None
    source: PromptSource[Prompt]
    spare: PromptSource[Prompt]
    demonstrations: Mapping[str, Sequence[Sequence[int]]]
    held_out: Sequence[Prompt]
    references: Mapping[str, Sequence[int]]
    sampling: Sampling
    eval_samplings: Sequence[Sampling]
    closing: ExitStack

    @property
    def actors(self) -> list[WorkerGroup[Any]]:
        """Who does the work in processes of their own."""
        groups: list[WorkerGroup[Any]] = [self.engines.group, self.learner.group]
        return [group for group in groups if not isinstance(group, LocalWorkerGroup)]

    def evaluate(
        self, pool: RewardPool, seed: int, progress: Progress, record: Record = lambda row: None
    ) -> list[Evaluation]:
        """Held-out figures of the weights that the engines hold, one for each of eval_samplings.

        Args:
            pool: reward workers.
            seed: of the run.
            progress: where to show progress.
            record: given every completion with its verdicts.
        """
        seed, total = seeding.derive(seed, "evaluate"), len(self.held_out) * len(self.eval_samplings)
        decode = functools.partial(self.engines.generate, role=EVALUATE)
        parts = (decode, pool, self.held_out, self.tokenizer)
        with progress.track("evaluating", total) as advance:
            one = functools.partial(evaluate, seed=seed, advance=advance, record=record)
            return [one(*parts, sampling) for sampling in self.eval_samplings]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.closing.__exit__(*error)


def build_run(config: Config, folder: Path, progress: Progress, *, trains: bool = True) -> Run:
    """Build every part.

    Args:
        config: the validated configuration.
        folder: the run folder; a model made from scratch is kept in its ``initial`` folder.
        progress: where to show progress.
        trains: False = for evaluation alone: what only training needs is not built.
    Raises:
        UserError: an option, file or combination that cannot work, in one line.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with ExitStack() as stack:
        if not (folder / "initial").exists():
            stack.push(functools.partial(forget_refused, folder))
        config = with_start_model(config, folder)
        run = _build_run(config, folder, progress, stack, trains=trains)
        return dataclasses.replace(run, closing=stack.pop_all())


def _build_run(config: Config, folder: Path, progress: Progress, stack: ExitStack, *, trains: bool) -> Run:
    parts = choose_parts(config)
    algorithm, task, sampling, train_examples = parts.algorithm, parts.task, parts.sampling, parts.train_examples
    path = model_path(config, folder, task, train_examples)
    spec = WorkerSpec(config=config, path=path, folder=folder, sampling=sampling, trains=trains)
    launch = launch_local if config.cluster.kind == "local" else launch_ray
    workers = launch(spec, stack, progress.log)
    denoiser, tokenizer = workers.denoiser, workers.tokenizer
    limit = check_model(config, sampling, denoiser)

    def tokenised(examples: Sequence[Example]) -> list[Prompt]:
        system, traces = config.data.system_prompt, algorithm.needs.traces
        return [
            encode(example, tokenizer, max_prompt_tokens=limit, system_prompt=system, with_trace=traces)
            for example in each(progress, "tokenising", examples)
        ]

    seed = config.run.seed
    if config.learner.precompute_reference and algorithm.needs.reference and algorithm.needs.source == "rollouts":
        raise UserError(
            f"learner.precompute_reference = true: algorithm '{config.algorithm.name}' trains on fresh rollouts, "
            f"which cannot be scored beforehand; leave it out"
        )
    prompts = tokenised(train_examples)
    if config.data.prompts_per_step > len(prompts):
        progress.log(
            f"data.prompts_per_step = {config.data.prompts_per_step} is more than the {len(prompts)} rows of the "
            f"training split: a step holds rows more than once, with the same completions; set at most {len(prompts)}"
        )
    held_out = _held_out(config, task)
    canvas = sampling.max_new_tokens
    return Run(
        **{f.name: getattr(workers, f.name) for f in dataclasses.fields(workers)},
        task=task,
        algorithm=algorithm,
        rollouter=parts.rollouter,
        reward_pool=_reward_pool(config, task),
        source=PromptSource(prompts, config.data.prompts_per_step, seed),
        spare=PromptSource(prompts, config.data.prompts_per_step, seeding.derive(seed, "resample")),
        demonstrations=demonstrations(algorithm, train_examples, denoiser, tokenizer, canvas, progress),
        held_out=tokenised(held_out),
        references=references(algorithm, held_out, denoiser, tokenizer, canvas, progress),
        sampling=sampling,
        eval_samplings=_eval_samplings(config, sampling),
        closing=stack,
    )


def _eval_samplings(config: Config, sampling: Sampling) -> list[Sampling]:
    speeds = config.evaluate.tokens_per_step
    whole = dataclasses.replace(sampling, temperature=config.evaluate.temperature)
    if sampling.confidence == "model":  # else the order of positions needs the filters
        whole = dataclasses.replace(whole, top_k=None, top_p=None)
    return [whole] if speeds is None else [dataclasses.replace(whole, tokens_per_step=n, steps=None) for n in speeds]


def _held_out(config: Config, task: Task) -> Sequence[Example]:
    examples = task.examples("test")
    order = list(range(len(examples)))
    seeding.python_random(0, "held-out").shuffle(order)  # not the run's seed: runs are compared on the same examples
    return [examples[i] for i in order[: config.evaluate.limit]]


def _reward_pool(config: Config, task: Task) -> RewardPool | None:
    plugins = reward_plugins(config, task)
    if not plugins:
        return None
    options = config.reward_pool
    return RewardPool(
        plugins,
        num_workers=options.workers,
        success=task.success or plugins[0].name,
        blank_truncated=options.truncated == "blank",
        max_seconds_per_step=options.max_seconds_per_step,
        limits=Containment(
            environment=options.environment,
            memory_gb=options.memory_gb,
            network=any(plugin.network for plugin in plugins),
        ),
    )
