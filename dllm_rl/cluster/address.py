"""Whether something that speaks gRPC listens at an address: Ray itself waits for minutes for one that is silent."""

from __future__ import annotations

import os
import socket

from dllm_rl.errors import UserError, first_line

ANSWER_S = 5.0  # for the connection, and again for the first bytes
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    (0, 0, 0, 4, 0, 0, 0, 0, 0)
)  # RFC 9113, 3.4, with empty SETTINGS
_SETTINGS = 4  # type of the frame with which every HTTP/2 server begins


def require_answer(address: str, timeout_s: float = ANSWER_S) -> None:
    """Refuse an address where nothing, or something else, answers.

    Args:
        address: of a cluster, "host:port" or "ray://host:port"; others ("auto") are left to Ray.
        timeout_s: for the connection, and again for an answer.
    Raises:
        UserError: nothing answers in time.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # what it says is not for us to read
            connection.sendall(_PREFACE)
            begin = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise UserError(refusal(address, first_line(error))) from error
    if len(begin) < 4 or begin[3] != _SETTINGS:
        raise UserError(refusal(address, "what listens there is not Ray"))


def refusal(address: str, why: str) -> str:
    """One line for a user whose cluster does not answer."""
    return (
        f"no Ray cluster answers at '{address}' ({why}); start one with 'ray start --head', or set "
        f"cluster.address: local"
    )
