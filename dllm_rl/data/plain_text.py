"""Text of users beside text of a chat template: only the template's special tokens are special."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_PRIVATE = range(0xE000, 0xF900)  # code points that no text has a meaning for


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a user's text; special tokens in it are encoded as the characters that they are written with."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


class PlainText:
    """Encodes rendered conversations so that special tokens in what users wrote stay text.

    While the template renders, each such token is replaced by a mark, one character that the texts do not have. What is
    special in the rendered text is then the template's own, and marks are encoded as the text that they stand for.
    A conversation without such tokens is encoded as the tokenizer does it.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any) -> None:
        """Find the special tokens in texts.

        Args:
            texts: everything that users wrote of one conversation.
            tokenizer: a transformers tokenizer.
        """
        self._tokenizer = tokenizer
        self._ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        whole = "\n".join(texts)
        found = sorted(set(self._special.findall(whole)))
        free = (chr(point) for point in _PRIVATE if chr(point) not in whole)
        self._marks = dict(zip(found, free, strict=False))

    def mark(self, text: str) -> str:
        """A user's text with marks, for the template."""
        return self._special.sub(lambda match: self._marks[match[0]], text)

    def unmark(self, text: str) -> str:
        """The text as it was."""
        for token, mark in self._marks.items():
            text = text.replace(mark, token)
        return text

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered text with marks."""
        ids: list[int] = []
        if not self._marks:
            ids = self._tokenizer.encode(rendered, add_special_tokens=False)
            return ids
        begin = 0
        for match in self._special.finditer(rendered):
            ids += encode_text(self.unmark(rendered[begin : match.start()]), self._tokenizer)
            ids.append(self._ids[match[0]])
            begin = match.end()
        return ids + encode_text(self.unmark(rendered[begin:]), self._tokenizer)
