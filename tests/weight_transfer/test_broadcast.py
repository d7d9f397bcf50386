"""The meeting place of a push: on one interface, and of no use to who does not know its key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from dllm_rl.weight_transfer.broadcast import Broadcast

HOST, CPU = "127.0.0.1", torch.device("cpu")
AT = {"size": 2, "host": HOST, "device": CPU}


def listening():
    found = psutil.Process().net_connections("inet")
    return {(one.laddr.ip.removeprefix("::ffff:"), one.laddr.port) for one in found if one.status == "LISTEN"}


def test_a_stranger_takes_no_place_and_the_group_meets_all_the_same():
    sender, receiver, stranger = Broadcast(), Broadcast(), Broadcast()
    address = sender.open(HOST, 30.0)
    guessed = (*address[:2], "0" * 32)
    with ThreadPoolExecutor(3) as threads:
        intruding = threads.submit(stranger.join, guessed, rank=1, timeout_s=1.0, **AT)
        with pytest.raises(RuntimeError):
            intruding.result(30)
        ends = [
            threads.submit(end.join, address, rank=r, timeout_s=30.0, **AT) for r, end in ((0, sender), (1, receiver))
        ]
        for end in ends:
            end.result(60)
        sent = torch.arange(16, dtype=torch.uint8)
        giving, got = threads.submit(sender.send, sent), receiver.receive(None, 16, CPU)
        giving.result(60)
    assert torch.equal(got, sent)


def test_the_meeting_place_is_on_one_interface_and_closed_after_the_first_bucket():
    before = listening()
    sender, receiver = Broadcast(), Broadcast()
    address = sender.open(HOST, 30.0)
    opened = listening() - before
    assert opened == {address[:2]}
    with ThreadPoolExecutor(2) as threads:
        list(
            threads.map(
                lambda end: end[1].join(address, rank=end[0], timeout_s=30.0, **AT), enumerate((sender, receiver))
            )
        )
        giving = threads.submit(sender.send, torch.zeros(16, dtype=torch.uint8))
        receiver.receive(None, 16, CPU)
        giving.result(60)
    assert not opened & listening()


def test_every_push_has_a_key_of_its_own():
    assert len({Broadcast().open(HOST, 5.0)[2] for _ in range(2)}) == 2
