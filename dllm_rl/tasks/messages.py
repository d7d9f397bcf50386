"""Prompts and completions as users write them: text, or message lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from dllm_rl.errors import UserError
from dllm_rl.types import Example

_ROLES = ("system", "user", "assistant", "tool")
Messages = list[dict[str, str]]


def prompt_of(value: Any, what: str) -> str | Messages:
    """A prompt: text, or messages that do not end with the assistant's.

    Args:
        value: of the column.
        what: it is called in errors: file, line and column.
    Raises:
        UserError: it is none.
    """
    if isinstance(value, str) and value:
        return value
    messages = _messages(value, what)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{what}: ends with an assistant message; that belongs into 'completion'")
    return messages


def completion_of(value: Any, conversation: bool, what: str) -> str:
    """The text of a completion: as it is, or the content of its one assistant message.

    Args:
        value: of the column.
        conversation: whether the prompt is a message list.
        what: as in prompt_of.
    Raises:
        UserError: it is none, or not of the prompt's form.
    """
    if isinstance(value, str) and value:
        if conversation:
            raise UserError(f"{what}: is text, but the prompt is a message list; both must be of one form")
        return value
    messages = _messages(value, what)
    if not conversation:
        raise UserError(f"{what}: is a message list, but the prompt is text; both must be of one form")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{what}: must be exactly one assistant message")
    return messages[0]["content"]


def split_messages(value: Any, what: str) -> tuple[Messages, Messages]:
    """(prompt, completion) of a whole conversation: the assistant's last message, and what comes before it.

    Raises:
        UserError: it is no conversation that ends with the assistant.
    """
    messages = _messages(value, what)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise UserError(f"{what}: must end with an assistant message that answers what comes before it")
    return messages[:-1], messages[-1:]


def shared_prompt(pair: Mapping[str, Any], where: str) -> tuple[str | Messages, dict[str, Any]]:
    """The prompt of a preference row that has none of its own: what chosen and rejected both begin with.

    A space at the end of a shared text belongs to the completions, as in ``trl.data_utils.extract_prompt``.

    Args:
        pair: chosen and rejected.
        where: the row stands, for errors.
    Returns:
        the prompt, and the pair without it.
    Raises:
        UserError: they are not of one form, begin differently, or one is the beginning of the other.
    """
    chosen, rejected = pair["chosen"], pair["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise UserError(f"{where}: chosen and rejected must both be text, or both be message lists")
    length = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and chosen[:length].endswith(" "):
        length -= 1
    if not 0 < length < min(len(chosen), len(rejected)):
        raise UserError(
            f"{where}: has no prompt of its own, and chosen and rejected do not share a beginning before they differ; "
            f"add a column 'prompt'"
        )
    return prompt_of(chosen[:length], f"{where}: what chosen and rejected share"), {
        "chosen": chosen[length:],
        "rejected": rejected[length:],
    }


def with_shots(example: Example, shots: Sequence[tuple[Example, str]]) -> Example:
    """An example whose prompt begins with solved ones.

    Args:
        example: of either form.
        shots: of the same form, with the completion to show for each.
    Raises:
        UserError: they are of different forms.
    """
    if any(isinstance(shot.prompt, str) != isinstance(example.prompt, str) for shot, _ in shots):
        raise UserError(f"example '{example.uid}': is text and few-shot examples are conversations, or the other way")
    if isinstance(example.prompt, str):
        before = "".join(f"{shot.prompt}{text}\n\n" for shot, text in shots)
        return dataclasses.replace(example, prompt=before + example.prompt)
    system = [m for m in example.prompt[:1] if m["role"] == "system"]
    said = [m for shot, text in shots for m in (*_without_system(shot.prompt), {"role": "assistant", "content": text})]
    return dataclasses.replace(example, prompt=[*system, *said, *_without_system(example.prompt)])


def _without_system(messages: str | Messages) -> Messages:
    assert not isinstance(messages, str), "the caller has looked"
    return messages[1:] if messages[0]["role"] == "system" else messages


def _messages(value: Any, what: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} is {value!r:.60}, expected text or a list of messages, not empty")
    made: Messages = []
    for place, message in enumerate(value, start=1):
        # A column of structs has every key in every message, with null where the row had none.
        told = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if set(told) != {"role", "content"} or told["role"] not in _ROLES or not isinstance(told["content"], str):
            raise UserError(
                f'{what}: message {place} is {message!r:.60}, expected {{"role": one of {", ".join(_ROLES)}, '
                f'"content": text}}'
            )
        made.append(told)
    return made
