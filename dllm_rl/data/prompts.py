"""From examples to tokens: chat templates, and nothing truncated or dropped in silence."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

from dllm_rl.errors import UserError
from dllm_rl.types import Example, Prompt


def encode(
    example: Example,
    tokenizer: Any,
    *,
    max_prompt_tokens: int | None = None,
    system_prompt: str | None = None,
    with_trace: bool = False,
) -> Prompt:
    """Tokenise the prompt of an example.

    A message list goes through the tokenizer's chat template; text is taken as it is, unless there is a system prompt
    to put before it.

    Args:
        example: the row.
        tokenizer: a transformers tokenizer.
        max_prompt_tokens: longest prompt allowed.
        system_prompt: put before every prompt, as a system message.
        with_trace: tokenise the reference reasoning too.
    Raises:
        UserError: a prompt that is too long, cannot be represented, or needs a chat template that is not there.
    """
    text = render(example.prompt, tokenizer, example.uid, system_prompt=system_prompt)
    ids = _tokens(text, tokenizer, f"prompt of example '{example.uid}'")
    if not ids:
        raise UserError(f"example '{example.uid}': its prompt is empty")
    if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
        raise UserError(
            f"example '{example.uid}': its prompt has {len(ids)} tokens, {max_prompt_tokens} are allowed; raise "
            f"data.max_prompt_tokens (if the model has room beside sampling.max_new_tokens) or filter the data"
        )
    return Prompt(
        uid=example.uid,
        token_ids=tuple(ids),
        text=text,
        answer=example.answer,
        task=example.task,
        columns=example.columns,
        trace=tuple(_tokens(example.trace, tokenizer, f"trace of example '{example.uid}'"))
        if with_trace and example.trace
        else (),
    )


def encode_completion(
    text: str, tokenizer: Any, *, uid: str = "?", prompt: str | list[dict[str, str]] | None = None
) -> list[int]:
    """Tokens of a reference completion, without EOS.

    Args:
        text: the completion.
        tokenizer: a transformers tokenizer.
        uid: of the example, for messages.
        prompt: its prompt. After a conversation, the completion is what the chat template makes of it, so that prompt
            and completion read as in the model's own conversations (some templates put something before the answer).
    Raises:
        UserError: the text cannot be represented, or the chat template rewrites the prompt or the completion.
    """
    what = f"completion of example '{uid}'"
    if isinstance(prompt, list):
        before = render(prompt, tokenizer, uid)
        whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        found = whole.rfind(text)
        if not whole.startswith(before) or found < len(before):
            raise UserError(
                f"{what}: the chat template does not render prompt and completion as the prompt followed by the "
                f"completion; strip spaces around the completion, or use plain-text prompts"
            )
        text = whole[len(before) : found + len(text)]
    return _tokens(text, tokenizer, what)


def render(
    prompt: str | list[dict[str, str]], tokenizer: Any, uid: str = "?", *, system_prompt: str | None = None
) -> str:
    """The prompt as text, chat template applied up to where the assistant starts to speak."""
    if isinstance(prompt, str) and system_prompt is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is not None:
        if messages[0]["role"] == "system":
            raise UserError(f"example '{uid}' has a system message of its own; drop data.system_prompt, or the message")
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"example '{uid}' is a conversation, but the tokenizer has no chat template; use an instruct model's "
            f"tokenizer, or plain-text prompts"
        )
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _tokens(text: str, tokenizer: Any, what: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.unk_token_id
    if (unknown is not None and unknown in ids) or (text and not ids):
        raise UserError(f"{what}: the tokenizer cannot represent all of {text[:60]!r}")
    # Tokenizers may normalise white space and Unicode, they may not drop characters.
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    missing = {c for c in set(normalize("NFKC", text)) - set(normalize("NFKC", back)) if not c.isspace()}
    if missing:
        shown = " ".join(repr(c) for c in sorted(missing)[:5])
        raise UserError(f"{what}: the tokenizer cannot represent {shown}")
    return ids
