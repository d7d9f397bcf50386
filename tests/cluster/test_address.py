"""cluster.address that answers nothing: one line in time, whatever listens there, or nothing at all."""

from __future__ import annotations

import socket
import threading

import pytest

from dllm_rl.cluster.address import require_answer
from dllm_rl.errors import UserError


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_a_port_that_accepts_and_stays_silent(listener):
    with pytest.raises(UserError, match=r"no Ray cluster answers at '127.0.0.1:\d+' \(timed out\)"):
        require_answer(f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2)


def test_a_closed_port():
    with socket.create_server(("127.0.0.1", 0)) as made:
        port = made.getsockname()[1]
    with pytest.raises(UserError, match=r"refused.*; start one with 'ray start --head'"):
        require_answer(f"ray://127.0.0.1:{port}")


def test_something_else_that_answers(listener):
    def greet():
        connection, _ = listener.accept()
        connection.sendall(b"220 mail.example ESMTP\r\n")

    threading.Thread(target=greet, daemon=True).start()
    with pytest.raises(UserError, match="what listens there is not Ray"):
        require_answer(f"127.0.0.1:{listener.getsockname()[1]}")


def test_a_server_of_http_2_is_taken_for_ray(listener):
    def greet():
        connection, _ = listener.accept()
        connection.sendall(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))

    threading.Thread(target=greet, daemon=True).start()
    require_answer(f"127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize("address", ["auto", "local", "ray://head"])
def test_addresses_without_a_port_are_left_to_ray(address):
    require_answer(address)
