"""A private Ray run: nobody else reaches it, and its end is noticed. One real run, in a process of its own."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = Path(__file__).with_name("private_session.py")


@pytest.fixture(scope="module")
def found():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(SESSION.parents[2])
    process = subprocess.run([sys.executable, SESSION], env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def loopback(address):
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_every_process_listens_on_the_loopback_alone(found):
    """Of Ray's (GCS, raylet, agents, workers) and of ours (both meeting places and gloo's sockets)."""
    assert len(found["listeners"]) >= 12
    assert [one for one in found["listeners"] if not loopback(one[1])] == []


def test_who_does_not_have_the_token_is_not_let_in(found):
    assert "let in" in found["owner"]
    assert "let in" not in found["stranger"] and "AuthenticationError" in found["stranger"]


def test_the_token_is_private_and_goes_with_the_run(found):
    assert found["modes"] == [0o700, 0o600]
    assert not found["token_left"] and found["environment_left"] == []


def test_the_end_of_the_raylet_ends_calls_that_wait_for_it(found):
    kind, text = found["lost"]
    assert kind == "ClusterLost" and "its raylet (process" in text and "was ended by signal 9" in text
    assert found["later"] == "ClusterLost"
