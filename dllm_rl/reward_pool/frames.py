"""Messages between the pool and its workers: four bytes of length, then JSON in UTF-8.

A verifier shares its process with the loop that answers, so whatever arrives may be forged. JSON makes values of it,
never objects or code; a forged value is no more than a wrong reward.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

MAX_REPLY = 1 << 20  # bytes; an answer has some 600 per row at most
MAX_REQUEST = 1 << 30
_LENGTH = struct.Struct(">I")


class ProtocolError(Exception):
    """Bytes that are not the answer to what was asked."""


def encode(message: Any) -> bytes:
    """A message as a frame.

    Dates and times become ISO 8601 text, tuples and arrays lists, keys of mappings text.

    Raises:
        TypeError: a value that JSON cannot hold.
        ProtocolError: a message of more than MAX_REQUEST bytes.
    """
    body = json.dumps(message, default=_plain).encode()
    if len(body) > MAX_REQUEST:
        raise ProtocolError(f"a message of {len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


def _plain(value: Any) -> Any:
    for name in ("isoformat", "tolist"):  # datetime; numpy and torch
        if callable(method := getattr(value, name, None)):
            return method()
    raise TypeError(f"{type(value).__name__} is neither text, number, list, mapping, date nor array")


class Inbox:
    """Bytes that have arrived, in any pieces."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, bytearray()

    def __len__(self) -> int:
        return len(self._bytes)

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are complete with these further bytes.

        Raises:
            ProtocolError: a frame that is longer than the limit or is not JSON.
        """
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > self._limit:
                raise ProtocolError(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError):  # also digits beyond Python's limit, and 100,000 open brackets
                raise ProtocolError("a frame that is not JSON") from None
            yield message
