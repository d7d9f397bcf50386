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
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config, RewardPlugin
from dllm_rl.data.collate import check_completion
from dllm_rl.data.prompts import encode, encode_completion
from dllm_rl.data.source import PromptSource
from dllm_rl.diffusion.layout import block_rule, check_sampling
from dllm_rl.driver.launch import Workers, WorkerSpec, launch_local, launch_ray
from dllm_rl.driver.refused import forget_refused
from dllm_rl.errors import UserError, require_package
from dllm_rl.evaluation.evaluate import Evaluation, evaluate
from dllm_rl.models.from_config import model_path
from dllm_rl.protocols.algorithm import Algorithm, ExtraRollouts, Plan
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.protocols.engine import EVALUATE
from dllm_rl.protocols.rollouter import Rollouter
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.protocols.task import Task
from dllm_rl.reports.progress import Progress, each
from dllm_rl.reward_pool.pool import RewardPool
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
    sampling: Sampling
    eval_samplings: Sequence[Sampling]
    closing: ExitStack

    @property
    def actors(self) -> list[WorkerGroup[Any]]:
        """Who does the work in processes of their own."""
        groups: list[WorkerGroup[Any]] = [self.engines.group, self.learner.group]
        return [group for group in groups if not isinstance(group, LocalWorkerGroup)]

    def evaluate(self, pool: RewardPool, seed: int, progress: Progress) -> list[Evaluation]:
        """Held-out figures of the weights that the engines hold, one for each of eval_samplings."""
        seed, total = seeding.derive(seed, "evaluate"), len(self.held_out) * len(self.eval_samplings)
        decode = functools.partial(self.engines.generate, role=EVALUATE)
        common = (decode, pool, self.held_out, self.tokenizer)
        with progress.track("evaluating", total) as advance:
            return [evaluate(*common, sampling, seed=seed, advance=advance) for sampling in self.eval_samplings]

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
        run = _build_run(config, folder, progress, stack, trains=trains)
        return dataclasses.replace(run, closing=stack.pop_all())


def _build_run(config: Config, folder: Path, progress: Progress, stack: ExitStack, *, trains: bool) -> Run:
    algorithm: Algorithm = build("algorithms", config.algorithm.name, config.algorithm.options)
    strategy = build("strategies", config.sampling.strategy.name, config.sampling.strategy.options)
    task: Task = build("tasks", config.data.task.name, config.data.task.options)
    rollouter: Rollouter = build("rollouters", config.rollout.rollouter.name, config.rollout.rollouter.options)
    _check_source(config, algorithm, strategy, task)
    source, extra = algorithm.needs.source, isinstance(algorithm, ExtraRollouts)
    if rollouter.multi_turn and (source != "rollouts" or extra):
        raise UserError(
            f"algorithm '{config.algorithm.name}' needs rollout.rollouter: {{name: single_turn}}, since it "
            + ("asks for further completions of prompts" if extra else f"trains on {source}")
        )
    other = config.evaluate.strategy
    if other is not None:  # refused here rather than by an engine
        build("strategies", other.name, other.options)
    if algorithm.needs.trajectory and strategy.revises:
        raise UserError(
            f"algorithm '{config.algorithm.name}' replays trajectories, but strategy '{config.sampling.strategy.name}' "
            f"revises committed tokens; choose another of the two"
        )
    sampling = Sampling(**config.sampling.model_dump(exclude={"preset", "strategy"}))
    train_examples = task.examples("train")
    algorithm.check_plan(
        Plan(
            sampling=sampling,
            strategy=config.sampling.strategy.name,
            has_policy=strategy.policy is not None,
            examples=train_examples,
            task=config.data.task.name,
            teacher=config.model.teacher is not None,
        )
    )
    _check_learner(config, algorithm)
    path = model_path(config, folder, task, train_examples)
    spec = WorkerSpec(config=config, path=path, folder=folder, sampling=sampling, trains=trains)
    launch = launch_local if config.cluster.kind == "local" else launch_ray
    workers = launch(spec, stack, progress.log)
    denoiser, tokenizer = workers.denoiser, workers.tokenizer
    room = denoiser.max_length - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt: the model takes "
            f"{denoiser.max_length} tokens"
        )
    check_sampling(denoiser, sampling)
    pause, size = config.rollout.pause_blocks, block_rule(denoiser, sampling)[0]
    if pause is not None and pause * size >= sampling.max_new_tokens:
        raise UserError(
            f"rollout.pause_blocks = {pause} blocks of {size} tokens are a whole completion (sampling.max_new_tokens = "
            f"{sampling.max_new_tokens}), so none would ever pause; set fewer, or a smaller sampling.block_size"
        )
    limit = min(room, config.data.max_prompt_tokens or room)

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
    demonstrations: dict[str, Sequence[Sequence[int]]] = {}
    if algorithm.needs.source != "rollouts":
        wanted = _demonstration if algorithm.needs.source == "demonstrations" else _pair
        for example in each(progress, "completions", train_examples):
            demonstrations[example.uid] = [
                _completion(text, example, denoiser, tokenizer, sampling.max_new_tokens) for text in wanted(example)
            ]
    return Run(
        **{f.name: getattr(workers, f.name) for f in dataclasses.fields(workers)},
        task=task,
        algorithm=algorithm,
        rollouter=rollouter,
        reward_pool=_reward_pool(config, task),
        source=PromptSource(prompts, config.data.prompts_per_step, seed),
        spare=PromptSource(prompts, config.data.prompts_per_step, seeding.derive(seed, "resample")),
        demonstrations=demonstrations,
        held_out=tokenised(held_out),
        sampling=sampling,
        eval_samplings=_eval_samplings(config, sampling),
        closing=stack,
    )


def _check_learner(config: Config, algorithm: Algorithm) -> None:
    trains_policy, values = "policy" in algorithm.needs.trains, algorithm.needs.values
    if config.rollout.correction is not None and (trains_policy or values):
        what = "choices of positions" if trains_policy else "advantages from a value model"
        raise UserError(
            f"rollout.correction = {config.rollout.correction}: it weights advantages by replayed tokens, which does "
            f"not reach the {what} of algorithm '{config.algorithm.name}'; set it to null"
        )
    if config.rollout.correction is not None:
        _check_correction(config, algorithm)
    if config.learner.reference.kind == "ema" and not algorithm.needs.reference:
        raise UserError(
            f"learner.reference.kind = ema: algorithm '{config.algorithm.name}' reads no reference with these options; "
            f"leave learner.reference out, or give the algorithm its divergence (beta > 0, if it has one)"
        )
    if config.model.teacher is not None:
        _check_teacher(config, algorithm)
    if config.learner.backend == "torch":
        return
    require_package("deepspeed", "deepspeed", "learner.backend: deepspeed")
    if config.learner.zero_options:
        from dllm_rl.learner.zero import check_options

        check_options(config.learner)
    if trains_policy or values:
        what = "an unmasking policy" if trains_policy else "a value model"
        raise UserError(
            f"algorithm '{config.algorithm.name}' trains {what}, which runs on one rank with learner.backend: torch"
        )


def _check_teacher(config: Config, algorithm: Algorithm) -> None:
    name = config.algorithm.name
    if not algorithm.needs.reference:
        raise UserError(
            f"model.teacher is the reference of a run, and algorithm '{name}' reads none with these options; leave "
            f"model.teacher out, or give the algorithm its divergence (beta > 0, if it has one)"
        )
    assert config.model.teacher is not None, "the caller asked"
    if config.learner.reference.kind == "ema":
        raise UserError(
            "learner.reference.kind = ema moves the start of the run towards the model, and model.teacher takes its "
            "place; leave one of the two out"
        )
    if config.model.teacher.autoregressive and algorithm.needs.draws:
        raise UserError(
            f"model.teacher.autoregressive: algorithm '{name}' reads the log-probabilities of each draw, and an "
            f"autoregressive teacher has the same for all; name a masked diffusion model, or choose another algorithm"
        )


def _check_correction(config: Config, algorithm: Algorithm) -> None:
    sampling, level = config.sampling, config.rollout.correction
    if level == "token" and algorithm.needs.row_credit:
        raise UserError(
            f"rollout.correction = token weighs each token, and algorithm '{config.algorithm.name}' has one advantage "
            f"per row; set rollout.correction: sequence"
        )
    if sampling.temperature == 0 or sampling.cfg_scale:
        what = "sampling.cfg_scale guides" if sampling.cfg_scale else "sampling.temperature = 0 makes greedy"
        raise UserError(
            f"rollout.correction = {level} weighs tokens by how probable their draw was, and {what} tokens; set "
            f"sampling.temperature: 1.0 and sampling.cfg_scale: 0"
        )


def reward_plugins(config: Config, task: Task) -> list[RewardPlugin]:
    """The rewards of the configuration, or the task's own."""
    if config.rewards is not None:
        return config.rewards
    return [RewardPlugin(name=name) for name in task.rewards]


def _check_source(config: Config, algorithm: Algorithm, strategy: UnmaskingStrategy, task: Task) -> None:
    _check_groups(config, algorithm)
    if algorithm.needs.source != "rollouts":
        if config.drift.limits:
            raise UserError(
                f"section drift compares rollouts, and algorithm '{config.algorithm.name}' trains on "
                f"{algorithm.needs.source}; leave the section out"
            )
        return
    if not reward_plugins(config, task):
        raise UserError(f"task '{config.data.task.name}' has no rewards of its own; list some under 'rewards:'")
    if config.data.samples_per_prompt < algorithm.needs.group_size:
        raise UserError(
            f"data.samples_per_prompt = {config.data.samples_per_prompt}: algorithm '{config.algorithm.name}' compares "
            f"the samples of a prompt and needs at least {algorithm.needs.group_size}"
        )
    if config.sampling.temperature == 0 and config.data.samples_per_prompt > 1 and not strategy.samples:
        raise UserError(
            "sampling.temperature = 0 makes all samples of a prompt the same and every advantage 0; "
            "set sampling.temperature to 1.0"
        )


def _check_groups(config: Config, algorithm: Algorithm) -> None:
    """What compares the samples of a prompt needs a method that does."""
    source, data, name = algorithm.needs.source, config.data, config.algorithm.name
    alone = f"trains on {source}" if source != "rollouts" else "has a value model" if algorithm.needs.values else ""
    for wanted, option, off in (
        (config.reward_normalisation == "decoupled", "reward_normalisation = decoupled", "total"),
        (data.resample_flat_groups > 0, f"data.resample_flat_groups = {data.resample_flat_groups}", "0"),
        (data.keep_accuracy is not None and source != "rollouts", f"data.keep_accuracy = {data.keep_accuracy}", "null"),
    ):
        if wanted and alone:
            raise UserError(f"{option} compares samples of a prompt, and algorithm '{name}' {alone}; set it to {off}")
    if data.resample_flat_groups and isinstance(algorithm, ExtraRollouts):
        raise UserError(
            f"data.resample_flat_groups = {data.resample_flat_groups} replaces groups, and algorithm '{name}' asks for "
            f"further completions of their prompts; set it to 0"
        )


def _eval_samplings(config: Config, sampling: Sampling) -> list[Sampling]:
    speeds = config.evaluate.tokens_per_step
    whole = dataclasses.replace(sampling, temperature=config.evaluate.temperature)
    if sampling.confidence == "model":  # else the order of positions needs the filters
        whole = dataclasses.replace(whole, top_k=None, top_p=None)
    return [whole] if speeds is None else [dataclasses.replace(whole, tokens_per_step=n, steps=None) for n in speeds]


def _demonstration(example: Example) -> Sequence[str]:
    if example.completion is None:
        raise UserError(f"example '{example.uid}' has no completion to train on; supervised training needs one per row")
    return [example.completion]


def _pair(example: Example) -> Sequence[str]:
    if example.chosen is None or example.rejected is None:
        raise UserError(
            f"example '{example.uid}' is not a preference pair; this algorithm needs a chosen and a rejected completion"
        )
    if example.chosen == example.rejected:
        raise UserError(
            f"example '{example.uid}': its chosen and its rejected completion are the same, so there is nothing to "
            f"prefer; remove the row"
        )
    return [example.chosen, example.rejected]


def _completion(text: str, example: Example, denoiser: Denoiser, tokenizer: Any, max_new_tokens: int) -> Sequence[int]:
    tokens = encode_completion(text, tokenizer, uid=example.uid, prompt=example.prompt)
    check_completion(example.uid, tokens, denoiser, max_new_tokens)  # known now, rather than when its turn comes
    return tokens


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
    blank = options.truncated == "blank"
    return RewardPool(plugins, num_workers=options.workers, success=task.success, blank_truncated=blank)
