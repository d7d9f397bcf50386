"""The parts of a run that are chosen before anything starts, and what is refused of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config, RewardPlugin
from dllm_rl.diffusion.layout import block_rule, check_sampling
from dllm_rl.errors import UserError, require_package
from dllm_rl.protocols.algorithm import Algorithm, ExtraRollouts, Plan
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.protocols.rollouter import Rollouter
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.protocols.task import Task
from dllm_rl.types import Example, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a configuration names, made and checked against each other.

    Attributes:
        algorithm: the method.
        task: the task.
        rollouter: makes the samples that it learns from.
        sampling: decoding while training.
        train_examples: the training rows.
    """

    algorithm: Algorithm
    task: Task
    rollouter: Rollouter
    sampling: Sampling
    train_examples: Sequence[Example]


def choose_parts(config: Config) -> Parts:
    """Make the parts that need no model.

    Raises:
        UserError: an option or a combination that cannot work, in one line.
    """
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
    return Parts(algorithm=algorithm, task=task, rollouter=rollouter, sampling=sampling, train_examples=train_examples)


def check_model(config: Config, sampling: Sampling, denoiser: Denoiser) -> int:
    """Compare a plan with the model; no weights are looked at.

    Returns:
        the most tokens that a prompt may have.
    Raises:
        UserError: no room for a prompt, or options of decoding that do not go with the model.
    """
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
    return min(room, config.data.max_prompt_tokens or room)


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
