"""From examples to tokens: chat templates, and nothing truncated, dropped or given a meaning in silence."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

from jinja2 import TemplateError

from dllm_rl.data.plain_text import PlainText, encode_text
from dllm_rl.errors import UserError, first_line
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
    to put before it. Special tokens in what users wrote, such as "<|im_end|>", are encoded as text.

    Args:
        example: the row.
        tokenizer: a transformers tokenizer.
        max_prompt_tokens: longest prompt allowed.
        system_prompt: put before every prompt, as a system message.
        with_trace: tokenise the reference reasoning too.
    Raises:
        UserError: a prompt that is too long, cannot be represented, or needs a chat template that is not there.
    """
    conversation = _conversation(example.prompt, example.uid, system_prompt)
    what = f"prompt of example '{example.uid}'"
    if conversation is None:
        text, ids = str(example.prompt), _tokens(str(example.prompt), tokenizer, what)
    else:
        plain = PlainText((part for message in conversation for part in message.values()), tokenizer)
        rendered = _render(conversation, plain, tokenizer, example.uid)
        text, ids = plain.unmark(rendered), _tokens(rendered, tokenizer, what, plain)
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
        messages=None if isinstance(example.prompt, str) else example.prompt,
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
    if not isinstance(prompt, list):
        return _tokens(text, tokenizer, what)
    plain = PlainText([text, *(part for message in prompt for part in message.values())], tokenizer)
    before = _render(prompt, plain, tokenizer, uid)
    marked = plain.mark(text)
    whole = _apply(tokenizer, [*_marked(prompt, plain), {"role": "assistant", "content": marked}])
    found = whole.rfind(marked)
    if not whole.startswith(before) or found < len(before):
        raise UserError(
            f"{what}: the chat template does not render prompt and completion as the prompt followed by the "
            f"completion; strip spaces around the completion, or use plain-text prompts"
        )
    return _tokens(whole[len(before) : found + len(marked)], tokenizer, what, plain)


def _conversation(
    prompt: str | list[dict[str, str]], uid: str, system_prompt: str | None
) -> list[dict[str, str]] | None:
    """What the chat template renders; None for text that is taken as it is."""
    if isinstance(prompt, str) and system_prompt is None:
        return None
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is not None:
        if messages[0]["role"] == "system":
            raise UserError(f"example '{uid}' has a system message of its own; drop data.system_prompt, or the message")
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages


def _render(messages: list[dict[str, str]], plain: PlainText, tokenizer: Any, uid: str) -> str:
    """The conversation as marked text, up to where the assistant starts to speak."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"example '{uid}' is a conversation, but the tokenizer has no chat template; use an instruct model's "
            f"tokenizer, or plain-text prompts"
        )
    return _apply(tokenizer, _marked(messages, plain), add_generation_prompt=True)


def _marked(messages: list[dict[str, str]], plain: PlainText) -> list[dict[str, str]]:
    return [{key: plain.mark(part) for key, part in message.items()} for message in messages]


def _apply(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:  # what does not parse, and what a template refuses by raise_exception
        raise UserError(
            f"the chat template refuses a conversation: {first_line(error)}; see data.chat_template"
        ) from None
    return text


def _tokens(text: str, tokenizer: Any, what: str, plain: PlainText | None = None) -> list[int]:
    """Tokens of a user's text or, with what marked it, of a rendered conversation."""
    if plain is None:
        ids = encode_text(text, tokenizer)
    else:
        ids, text = plain.encode(text), plain.unmark(text)
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
