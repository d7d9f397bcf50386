"""How the rows of a step become micro-batches: on one rank, for rows that fill their canvas."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dllm_rl.config.plugins import build, engine_class
from dllm_rl.config.schema import Config
from dllm_rl.diffusion import likelihood
from dllm_rl.driver.step_masks import step_masks
from dllm_rl.models.evaluating import has_dropout
from dllm_rl.planning.dry_run import Rows
from dllm_rl.planning.work import Shape, block_of, full_rows, samples_of, turns_of
from dllm_rl.protocols.algorithm import Algorithm

_MAX_BATCH_TOKENS = 1 << 16  # of engines that have no such option


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The arithmetic of a step.

    Attributes:
        prompts: of a step, or demonstrations.
        samples: of a prompt.
        ranks: learners.
        minibatches: optimiser updates of a pass over the rows.
        passes: over the rows of a step.
        length: padded tokens of a row; a block-causal model forwards a clean and a noised copy of the completion.
        copies: noised copies that a rank forwards for its rows of a minibatch; equal inputs are forwarded once.
        microbatches: that they are split into.
        micro: the largest of them.
        kept_graph: its graph is computed once: everything fits one micro-batch, and nothing is dropped at random.
        decoded: the rows of a forward of a rollout, and the positions that a token is proposed for.
        forwards: to decode a row, at most.
    """

    prompts: int
    samples: int
    ranks: int
    minibatches: int
    passes: int
    length: int
    copies: int
    microbatches: int
    micro: Rows
    kept_graph: bool
    decoded: Rows
    forwards: int

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.prompts * self.samples

    @property
    def updates(self) -> int:
        """Optimiser updates of a step."""
        return self.minibatches * self.passes


def batch_of(config: Config, shape: Shape, prompt_tokens: int, *, module: object = None) -> Batch:
    """The arithmetic of a configuration.

    Args:
        config: of the run.
        shape: of its model.
        prompt_tokens: of the longest prompt.
        module: the model; whether it drops at random decides how often a forward is computed.
    """
    algorithm: Algorithm = build("algorithms", config.algorithm.name, config.algorithm.options)
    ranks, canvas, budget = (
        config.cluster.learners,
        config.sampling.max_new_tokens,
        config.learner.tokens_per_microbatch,
    )
    length, prompts = prompt_tokens + canvas, config.data.prompts_per_step
    samples, parts = samples_of(config, algorithm), min(config.learner.minibatches, prompts)
    group = full_rows(config, shape, prompt_tokens, rows=samples)
    masks = step_masks(algorithm, group, config, 0)[0]
    # All in one micro-batch; nothing is scored where an unmasking policy alone is trained.
    work = likelihood.plan(group, masks, length * masks.mask.shape[0] * samples)
    groups = math.ceil(math.ceil(prompts / parts) / ranks)
    each = len(work[0].example) * turns_of(config, algorithm)[1] if work else 0
    copies = each * groups
    most = max(1, min(copies, budget // length))
    scored = math.ceil(int((masks.weight != 0).sum()) * most / len(work[0].example)) if work else 0
    microbatches = math.ceil(copies / most)
    _, engine = engine_class(config.engine.name, config.engine.options)
    at_once = getattr(engine, "max_batch_tokens", _MAX_BATCH_TOKENS) // length
    decoded = max(1, min(config.rollout.rows_per_call, at_once, prompts * samples))
    block = block_of(config, shape)
    return Batch(
        prompts=prompts,
        samples=samples,
        ranks=ranks,
        minibatches=parts,
        passes=config.learner.updates_per_step,
        length=length,
        copies=copies,
        microbatches=microbatches,
        micro=Rows(number=most, length=length, scored=scored),
        kept_graph=microbatches == 1 and not (module is not None and has_dropout(module)),  # type: ignore[arg-type]
        decoded=Rows(number=decoded, length=block if shape.block_causal else length, scored=decoded * block),
        forwards=int(group.num_forwards[0]),
    )
