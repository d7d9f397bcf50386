"""Correction for rollouts of older weights, or of approximate engines: truncated importance weights, from replays.

    rho_i = min(p_now(token_i | state) / p_then(token_i | state), cap)

where the state is the one in which the engine committed the token, and p_then is what the engine recorded: the ratio
is exact for any estimator that the algorithm uses afterwards. Both are the probabilities with which tokens are drawn,
after temperature, top-k, top-p and suppressed tokens: rollouts of older weights count as rollouts of the current ones
would. A token that could not be drawn any more counts 0, and what only the current weights would draw is missing.
Guidance and greedy decoding are refused with a correction. The choice of positions is not corrected; where it depends
on confidence, weights are those of the tokens given their order.

Source: Espeholt et al. 2018 (IMPALA, V-trace), arXiv:1802.01561; per token or per sequence as in Yao et al. 2025,
"Your efficient RL framework secretly brings you off-policy RL training".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dllm_rl.types import GIVEN, RolloutBatch


def truncated_weights(
    now: Tensor, batch: RolloutBatch, *, cap: float, level: Literal["token", "sequence"]
) -> tuple[Tensor, dict[str, float]]:
    """Factors for the advantages.

    Args:
        now: (N, L) nats; log-probability of drawing each generated token in the state of its commit, under the current
            weights.
        batch: with sampled_logp (or behaviour_logp, where they are the same) under the weights that generated it.
        cap: largest factor.
        level: "token" gives (N, L), "sequence" (N,) factors.
    Returns:
        the factors, without gradient, and figures to log.
    """
    generated = batch.generated
    then = batch.behaviour_logp if batch.sampled_logp is None else batch.sampled_logp
    log_ratio = torch.where(generated, now.detach() - then.to(now.device), 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1)
    ratio = log_ratio.exp()
    units = ratio[generated] if level == "token" else ratio
    figures = {
        "stale_ratio": units.mean().item() if units.numel() else 1.0,
        "stale_truncated": (units > cap).float().mean().item() if units.numel() else 0.0,
    }
    return ratio.clamp(max=cap), figures


def oldest_weights(batch: RolloutBatch) -> int:
    """Optimiser step of the oldest weights that committed a token."""
    steps = batch.weights_step[batch.weights_step != GIVEN]
    return int(steps.min()) if len(steps) else 0


def decoded_by_several(batch: RolloutBatch) -> Tensor:
    """(N,) bool: rows that were paused and went on with other weights."""
    steps = batch.weights_step
    newest = steps.masked_fill(~batch.generated, GIVEN).amax(-1)
    return ((steps != newest[:, None]) & batch.generated).any(-1)
