"""Builds the parts of a run from its configuration, refusing combinations that cannot work before anything starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_rl import registry, seeding
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config, RewardPlugin
from dllm_rl.data.prompts import encode, encode_completion
from dllm_rl.data.source import PromptSource
from dllm_rl.diffusion.layout import block_rule
from dllm_rl.learner.policy_learner import PolicyLearner
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import add_lora
from dllm_rl.models.tokenizers import byte_bpe_tokenizer, character_tokenizer, vocabulary_digest
from dllm_rl.plans import Plan
from dllm_rl.protocols import Algorithm, Learner, RolloutEngine, Task, UnmaskingStrategy
from dllm_rl.reports.progress import Progress
from dllm_rl.runtime.reward_pool import RewardPool, RewardSpec
from dllm_rl.types import Example, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that the training loop holds.

    Attributes:
        task: the task.
        tokenizer: of the model.
        engine: shares the learner's denoiser in one process.
        eval_engine: decodes held-out completions, with the same weights and the strategy of evaluation.
        algorithm: the method.
        denoiser: the model that decodes.
        learner: owns the trained weights, of the model or of the unmasking policy.
        pool: reward workers, or None for supervised training on a task without rewards.
        source: prompts of each step.
        demonstrations: uid -> tokens of its completions, for algorithms that train on them: the reference completion,
            or the chosen and the rejected one.
        held_out: prompts for evaluation.
        sampling: decoding while training.
        eval_samplings: decoding of each held-out evaluation.
        make_engine: strategy, weights=, keep_confidence= -> another engine over the same denoiser.
    """

    task: Task
    tokenizer: Any
    engine: RolloutEngine
    eval_engine: RolloutEngine
    algorithm: Algorithm
    denoiser: TransformersDenoiser
    learner: Learner
    pool: RewardPool | None
    source: PromptSource[Prompt]
    demonstrations: Mapping[str, Sequence[Sequence[int]]]
    held_out: Sequence[Prompt]
    sampling: Sampling
    eval_samplings: Sequence[Sampling]
    make_engine: Callable[..., RolloutEngine]

    def hand_over(self) -> None:
        """Tell the engines which weights they hold now."""
        self.engine.weights = self.eval_engine.weights = self.learner.version()

    def expert_engine(self, plugin: Mapping[str, Any]) -> RolloutEngine:
        """An engine over the same weights that decodes with another strategy, given as name and options."""
        options = {key: value for key, value in plugin.items() if key != "name"}
        strategy = build("strategies", plugin["name"], options)
        strategy.bind(vocabulary_digest(self.tokenizer), self.denoiser.device, trained_here=False)
        return self.make_engine(strategy, weights=self.engine.weights, keep_confidence=True)


def assemble(config: Config, folder: Path, show: Progress) -> Parts:
    """Build every part.

    Args:
        config: the validated configuration.
        folder: the run folder; a model made from scratch is kept in its ``initial`` folder.
        show: where to show progress.
    Raises:
        ValueError: an option, file or combination that cannot work, in one line.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    algorithm: Algorithm = build("algorithms", config.algorithm.name, config.algorithm.options)
    strategy = build("strategies", config.sampling.strategy.name, config.sampling.strategy.options)
    task: Task = build("tasks", config.data.task.name, config.data.task.options)
    _check_source(config, algorithm, strategy, task)
    other = config.evaluate.strategy
    eval_strategy = strategy if other is None else build("strategies", other.name, other.options)
    if algorithm.replays_trajectory and strategy.revises:
        raise ValueError(
            f"algorithm '{config.algorithm.name}' replays trajectories, but strategy '{config.sampling.strategy.name}' "
            f"revises committed tokens; choose another of the two"
        )
    sampling = _sampling(config)
    train_examples = task.examples("train")
    algorithm.check_plan(
        Plan(
            sampling=sampling,
            strategy=config.sampling.strategy.name,
            has_policy=strategy.policy is not None,
            examples=train_examples,
            task=config.data.task.name,
        )
    )
    denoiser, tokenizer = _model(config, folder, task, train_examples)
    room = denoiser.max_length - sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt: the model takes "
            f"{denoiser.max_length} tokens"
        )
    limit = min(room, config.data.max_prompt_tokens or room)

    def tokenised(examples: Sequence[Example]) -> list[Prompt]:
        encoded = []
        with show.track("tokenising", len(examples)) as advance:
            for example in examples:
                encoded.append(
                    encode(
                        example,
                        tokenizer,
                        max_prompt_tokens=limit,
                        system_prompt=config.data.system_prompt,
                        with_trace=algorithm.asks_further,
                    )
                )
                advance(1, "")
        return encoded

    seed = config.run.seed
    prompts = tokenised(train_examples)
    held_out = _held_out(config, task)
    demonstrations: dict[str, Sequence[Sequence[int]]] = {}
    if algorithm.source != "rollouts":
        wanted = _demonstration if algorithm.source == "demonstrations" else _pair
        with show.track("completions", len(train_examples)) as advance:
            for example in train_examples:
                demonstrations[example.uid] = [
                    _completion(text, example, tokenizer, sampling.max_new_tokens) for text in wanted(example)
                ]
                advance(1, "")
    vocabulary = vocabulary_digest(tokenizer)
    strategy.bind(vocabulary, denoiser.device, trained_here=algorithm.trains == "policy")
    if eval_strategy is not strategy:
        eval_strategy.bind(vocabulary, denoiser.device, trained_here=False)
    learner = _learner(config, folder, algorithm, strategy, denoiser, tokenizer)
    make_engine = functools.partial(
        registry.load("engines", config.engine.name), denoiser, max_batch_tokens=config.engine.max_batch_tokens
    )
    return Parts(
        task=task,
        tokenizer=tokenizer,
        engine=make_engine(strategy, weights=learner.version()),
        eval_engine=make_engine(eval_strategy, weights=learner.version()),
        algorithm=algorithm,
        denoiser=denoiser,
        learner=learner,
        pool=_pool(config, task),
        source=PromptSource(prompts, config.data.prompts_per_step, seed),
        demonstrations=demonstrations,
        held_out=tokenised(held_out),
        sampling=sampling,
        eval_samplings=_eval_samplings(config, sampling),
        make_engine=make_engine,
    )


def _learner(
    config: Config,
    folder: Path,
    algorithm: Algorithm,
    strategy: UnmaskingStrategy,
    denoiser: TransformersDenoiser,
    tokenizer: Any,
) -> Learner:
    seed, total_steps = config.run.seed, config.run.steps
    if algorithm.trains == "policy":
        denoiser.module.requires_grad_(False)
        size, origin = block_rule(denoiser, _sampling(config))
        return PolicyLearner(
            strategy,
            config.learner,
            total_steps=total_steps,
            seed=seed,
            block_size=size,
            block_origin=origin,
            sees_block_only=denoiser.block_size is not None,
        )
    return TorchLearner(
        denoiser,
        tokenizer,
        config.learner,
        total_steps=total_steps,
        seed=seed,
        keep_reference=algorithm.needs_reference,
        keep_values=algorithm.value_clip is not None,
        dump_folder=folder / "dumps",
    )


def reward_plugins(config: Config, task: Task) -> list[RewardPlugin]:
    """The rewards of the configuration, or the task's own."""
    if config.rewards is not None:
        return config.rewards
    return [RewardPlugin(name=name) for name in task.rewards]


def _check_source(config: Config, algorithm: Algorithm, strategy: UnmaskingStrategy, task: Task) -> None:
    if algorithm.source != "rollouts":
        return
    if not reward_plugins(config, task):
        raise ValueError(f"task '{config.data.task.name}' has no rewards of its own; list some under 'rewards:'")
    if config.data.samples_per_prompt < algorithm.min_group:
        raise ValueError(
            f"data.samples_per_prompt = {config.data.samples_per_prompt}: algorithm '{config.algorithm.name}' compares "
            f"the samples of a prompt and needs at least {algorithm.min_group}"
        )
    if config.sampling.temperature == 0 and config.data.samples_per_prompt > 1 and not strategy.samples:
        raise ValueError(
            "sampling.temperature = 0 makes all samples of a prompt the same and every advantage 0; "
            "set sampling.temperature to 1.0"
        )


def _sampling(config: Config) -> Sampling:
    s = config.sampling
    return Sampling(
        max_new_tokens=s.max_new_tokens,
        block_size=s.block_size,
        tokens_per_step=s.tokens_per_step,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
    )


def _eval_samplings(config: Config, sampling: Sampling) -> list[Sampling]:
    speeds = config.evaluate.tokens_per_step or [sampling.tokens_per_step]
    return [
        Sampling(
            max_new_tokens=sampling.max_new_tokens,
            block_size=sampling.block_size,
            tokens_per_step=speed,
            temperature=config.evaluate.temperature,
        )
        for speed in speeds
    ]


def _model(config: Config, folder: Path, task: Task, examples: Sequence[Example]) -> tuple[TransformersDenoiser, Any]:
    m = config.model
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[m.dtype]
    device = _device(m.device)
    initial = folder / "initial"
    if m.init is not None and not initial.exists():
        if m.family is None:
            raise ValueError("model.init needs model.family: llada, dream, sdar or tiny")
        tokenizer = _tokenizer(m.init.tokenizer, m.init.vocab_size, task, examples)
        made = create_denoiser(
            m.family,
            tokenizer,
            hidden_size=m.init.hidden_size,
            num_layers=m.init.num_layers,
            num_heads=m.init.num_heads,
            num_kv_heads=m.init.num_kv_heads,
            intermediate_size=m.init.intermediate_size,
            max_length=m.init.max_length,
            block_size=m.block_size,
            block_origin=m.block_origin or "response",
            seed=seeding.derive(config.run.seed, "model"),
        )
        save_denoiser(made, tokenizer, initial)
    denoiser, tokenizer = load_denoiser(
        str(initial) if m.path is None else m.path,
        family=m.family,
        dtype=dtype,
        device=device,
        revision=m.revision,
        block_size=m.block_size,
        block_origin=m.block_origin,
        trust_remote_code=m.trust_remote_code,
    )
    if m.lora is not None:
        lora = m.lora
        seed = seeding.derive(config.run.seed, "lora")
        add_lora(denoiser, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets, seed=seed)
    if m.gradient_checkpointing:
        denoiser.module.gradient_checkpointing_enable()
    return denoiser, tokenizer


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has no one type for it
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model.device = '{name}' cannot be used ({reason:.120}); auto, cpu or cuda") from error
    return device


def _tokenizer(kind: str, vocab_size: int, task: Task, examples: Sequence[Example]) -> Any:
    texts = [_text(e.prompt) + "".join(filter(None, (e.completion, e.chosen, e.rejected))) for e in examples]
    if kind == "characters":
        return character_tokenizer("".join(sorted({c for text in texts for c in text} | set(task.characters))))
    return byte_bpe_tokenizer(texts, vocab_size)


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _demonstration(example: Example) -> Sequence[str]:
    if example.completion is None:
        raise ValueError(
            f"example '{example.uid}' has no completion to train on; supervised training needs one per row"
        )
    return [example.completion]


def _pair(example: Example) -> Sequence[str]:
    if example.chosen is None or example.rejected is None:
        raise ValueError(
            f"example '{example.uid}' is not a preference pair; this algorithm needs a chosen and a rejected completion"
        )
    if example.chosen == example.rejected:
        raise ValueError(
            f"example '{example.uid}': its chosen and its rejected completion are the same, so there is nothing to "
            f"prefer; remove the row"
        )
    return [example.chosen, example.rejected]


def _completion(text: str, example: Example, tokenizer: Any, max_new_tokens: int) -> Sequence[int]:
    tokens = encode_completion(text, tokenizer, uid=example.uid, prompt=example.prompt)
    if not 0 < len(tokens) <= max_new_tokens:  # known now, rather than when its turn comes
        raise ValueError(
            f"example '{example.uid}': its completion has {len(tokens)} tokens, sampling.max_new_tokens is "
            f"{max_new_tokens}; raise it, or shorten the completion"
        )
    return tokens


def _held_out(config: Config, task: Task) -> Sequence[Example]:
    examples = task.examples("test")
    order = list(range(len(examples)))
    seeding.python_random(0, "held-out").shuffle(order)  # not the run's seed: runs are compared on the same examples
    return [examples[i] for i in order[: config.evaluate.limit]]


def _pool(config: Config, task: Task) -> RewardPool | None:
    plugins = reward_plugins(config, task)
    if not plugins:
        return None
    specs = [RewardSpec(name=p.name, weight=p.weight, timeout_s=p.timeout_s, options=p.options) for p in plugins]
    return RewardPool(specs, num_workers=config.reward_pool.workers, success=task.success)
