"""Whether the plugins that a configuration names exist, told without importing any of them."""

from __future__ import annotations

from collections.abc import Iterator

from dllm_rl import registry
from dllm_rl.config.schema import Config
from dllm_rl.registry import Kind


def check_names(config: Config) -> None:
    """Refuse registered names that nobody has registered; paths ("package.module:Name") are tried when they are built.

    Raises:
        UserError: naming the nearest one.
    """
    for kind, name in _named(config):
        registry.require_known(kind, name)


def _named(config: Config) -> Iterator[tuple[Kind, str]]:
    yield "algorithms", config.algorithm.name
    yield "tasks", config.data.task.name
    yield "strategies", config.sampling.strategy.name
    if config.evaluate.strategy is not None:
        yield "strategies", config.evaluate.strategy.name
    yield "engines", config.engine.name
    yield "rollouters", config.rollout.rollouter.name
    if config.cluster.transport != "auto":
        yield "transports", config.cluster.transport
    for reward in config.rewards or ():
        yield "rewards", reward.name
