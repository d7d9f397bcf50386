"""Commit the positions that a trained network chooses from the model's confidences.

Source: Learning unmasking policies, arXiv:2512.09106; the network is described in rollouts/policy_network.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.errors import UserError
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from rollouts import choices
from rollouts.policy_network import UnmaskingPolicy, load_policy, save_policy

_LOGP = {
    "bernoulli": choices.bernoulli_logp,
    "plackett_luce": choices.plackett_luce_logp,
    "ranking": choices.ranking_logp,
}


class Learned(UnmaskingStrategy):
    """A policy network; how many positions a forward commits is its own choice, except with a ranking."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        path: str | None = None  # a trained policy (policy.safetensors, or its folder); null = an untrained one
        distribution: Literal["bernoulli", "plackett_luce", "ranking"] | None = (
            None  # null = as trained, else bernoulli
        )
        temperature: float = 1.0  # utilities are divided by it; lower is more decided
        bias: float = 0.0  # added to utilities: above 0 commits more tokens per forward, below 0 fewer
        width: int = 128  # of an untrained network
        heads: int = 2
        seed: int = 0  # of an untrained network
        any_vocabulary: bool = False  # use a policy that was trained with another model's vocabulary

        def __post_init__(self) -> None:
            if self.temperature <= 0:
                raise UserError(f"temperature = {self.temperature}: must be > 0")

    config: Config
    policy: UnmaskingPolicy
    samples = True
    reads_canvas = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        about: dict[str, Any] = {}
        if config.path is None:
            self.policy = UnmaskingPolicy(width=config.width, heads=config.heads, seed=config.seed)
        else:
            self.policy, about = load_policy(Path(config.path))
        self.distribution = config.distribution or about.get("distribution", "bernoulli")
        self.vocabulary: str | None = about.get("vocabulary")

    @override
    def bind(self, vocabulary: str, device: torch.device, *, trained_here: bool) -> None:
        """Refuse a foreign or untrained policy, then move it to the device.

        Raises:
            UserError: the policy was trained with another vocabulary, or was never trained.
        """
        if self.config.path is None and not trained_here:
            raise UserError(
                "strategy 'learned' has no path, so its policy is untrained; give the path of a trained one, or train "
                "it with algorithm: {name: unmasking_policy} or {name: dcolt}"
            )
        if self.vocabulary not in (None, vocabulary) and not self.config.any_vocabulary:
            raise UserError(
                f"policy '{self.config.path}' was trained with another vocabulary ({self.vocabulary}, the model has "
                f"{vocabulary}); take the policy of this model, or set any_vocabulary: true to transfer it"
            )
        self.vocabulary = vocabulary
        self.policy.to(device)

    @override
    def save(self, folder: Path) -> None:
        save_policy(self.policy, folder, {"distribution": self.distribution, "vocabulary": self.vocabulary})

    @override
    def load(self, folder: Path) -> None:
        self.policy.load_state_dict(load_policy(folder)[0].state_dict())

    @override
    def select(self, candidates: Candidates) -> Tensor:
        """Ignores tokens_per_step, unless it draws a ranking."""
        c = candidates
        with torch.no_grad():
            utility = self._utility(c)
            if self.distribution == "ranking":
                return choices.draw_ranking(utility, c.eligible, c.noise, c.count)
            draw = choices.draw_bernoulli if self.distribution == "bernoulli" else choices.draw_plackett_luce
            return draw(utility, c.eligible, c.noise)

    @override
    def log_prob(self, candidates: Candidates, order: Tensor) -> Tensor:
        return _LOGP[self.distribution](self._utility(candidates), candidates.eligible, order)

    def _utility(self, candidates: Candidates) -> Tensor:
        c, utility = candidates, torch.zeros_like(candidates.logp)
        seen = c.context.any(0).nonzero().flatten()
        if not len(seen):
            return utility
        part = slice(int(seen[0]), int(seen[-1]) + 1)  # prompts and padding would only cost time
        values = self.policy(c.logp[:, part].exp(), c.masked[:, part], c.context[:, part], c.time)
        utility[:, part] = values / self.config.temperature + self.config.bias
        return utility
