"""Reference completions as tokens: what supervised algorithms train on, and what their held-out loss is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dllm_rl.data.collate import check_completion
from dllm_rl.data.prompts import encode_completion
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.reports.progress import Progress, each
from dllm_rl.types import Example


def demonstrations(
    algorithm: Algorithm,
    examples: Sequence[Example],
    denoiser: Denoiser,
    tokenizer: Any,
    max_new_tokens: int,
    progress: Progress,
) -> Mapping[str, Sequence[Sequence[int]]]:
    """Uid -> tokens of the completions that an algorithm trains on; none for one that trains on rollouts.

    Args:
        algorithm: says whether it wants one completion per example, or a pair.
        examples: of training.
        denoiser: says which tokens a completion must not hold.
        tokenizer: of the model.
        max_new_tokens: canvas length.
        progress: where to show progress.
    Raises:
        UserError: an example without what is wanted, or whose completion does not fit.
    """
    if algorithm.needs.source == "rollouts":
        return {}
    wanted = _demonstration if algorithm.needs.source == "demonstrations" else _pair
    return {
        example.uid: [_completion(text, example, denoiser, tokenizer, max_new_tokens) for text in wanted(example)]
        for example in each(progress, "completions", examples)
    }


def references(
    algorithm: Algorithm,
    examples: Sequence[Example],
    denoiser: Denoiser,
    tokenizer: Any,
    max_new_tokens: int,
    progress: Progress,
) -> Mapping[str, Sequence[int]]:
    """Uid -> tokens of held-out reference completions, for algorithms that train on such.

    One that does not fit costs its row of the loss, not the run, and is named in a line for the user.
    Args as in demonstrations.
    """
    found: dict[str, Sequence[int]] = {}
    refused: list[str] = []
    if algorithm.needs.source == "demonstrations":
        for example in examples:
            try:
                text = _demonstration(example)[0]
                found[example.uid] = _completion(text, example, denoiser, tokenizer, max_new_tokens)
            except UserError as error:
                refused.append(str(error))
    if refused:
        progress.log(
            f"{len(refused)} of {len(examples)} held-out examples are not in eval/loss; the first: {refused[0]}"
        )
    return found


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
