"""Countdown: an expression that uses each given number exactly once and equals the target.

    expression = term { ("+" | "-") term }      term = factor { ("*" | "/") factor }
    factor     = INTEGER | "(" expression ")"

Parsed and computed here in exact fractions, never with ``eval``: released rewards accept ``44**19**35``, ``//`` and
``4.4``, and hang on the first. There is no unary sign: a number must appear as it was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dllm_rl.errors import UserError
from rewards import Verdict, last_answer

MAX_CHARACTERS = 200  # six numbers of three digits need about 40
MAX_DEPTH = 20  # of parentheses
_TOKEN = re.compile(r"[0-9]{1,6}|[-+*/()]")  # ASCII digits alone: int() also reads other scripts


class Countdown:
    """1 for the target, `partial` for the right numbers with another value, else 0."""

    gold = True  # it compares with the numbers and the target of a row

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        partial: float = 0.1  # right numbers, wrong value; 0.1 in the papers

        def __post_init__(self) -> None:
            if not 0 <= self.partial < 1:
                raise UserError(f"partial = {self.partial}: must be in [0, 1); 1 means solved")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(
        self,
        prompts: list[Any],
        completions: list[str],
        *,
        numbers: list[Sequence[int]],
        target: list[int],
        **columns: list[Any],
    ) -> list[Verdict]:
        """One verdict per completion; "invalid" if it holds no expression of the grammar.

        The expression is the last <answer>...</answer>, or without one the last non-empty line; "= value" after it is
        ignored, the value is computed.
        """
        return [self._score(*row) for row in zip(completions, numbers, target, strict=True)]

    def _score(self, completion: str, numbers: Sequence[int], target: int) -> Verdict:
        text = _expression(completion)
        try:
            value, used = parse(text)
        except ValueError:
            return Verdict(0.0, "invalid")
        if sorted(used) != sorted(numbers):
            return Verdict(0.0)
        return Verdict(1.0 if value == target else self.config.partial)


def _expression(completion: str) -> str:
    answer = last_answer(completion)
    lines = [line for line in completion.splitlines() if line.strip()]
    text = answer if answer is not None else (lines[-1] if lines else "")
    return text.split("=")[0].strip()


def parse(text: str) -> tuple[Fraction, list[int]]:
    """Value of an expression and the numbers in it.

    Raises:
        UserError: not an expression of the grammar, beyond MAX_CHARACTERS or MAX_DEPTH, or a division by zero.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"longer than {MAX_CHARACTERS} characters")
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()) or re.search(r"[0-9]\s+[0-9]", text):
        raise UserError("characters outside the grammar")
    numbers: list[int] = []
    position = depth = 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1] if position <= len(tokens) else ""

    def factor() -> Fraction:
        nonlocal depth
        token = take()
        if token == "(":
            depth += 1
            if depth > MAX_DEPTH:
                raise UserError(f"parentheses nest deeper than {MAX_DEPTH}")
            inside = expression()
            if take() != ")":
                raise UserError("unbalanced parentheses")
            depth -= 1
            return inside
        if not token.isdigit():
            raise UserError(f"a number or '(' expected, found {token!r}")
        numbers.append(int(token))
        return Fraction(int(token))

    def term() -> Fraction:
        value = factor()
        while peek() in ("*", "/"):
            if take() == "*":
                value *= factor()
            else:
                divisor = factor()
                if divisor == 0:
                    raise UserError("division by zero")
                value /= divisor
        return value

    def expression() -> Fraction:
        value = term()
        while peek() in ("+", "-"):
            value = value + term() if take() == "+" else value - term()
        return value

    result = expression()
    if position != len(tokens):
        raise UserError(f"unexpected {tokens[position]!r}")
    return result, numbers
