"""The receiving end of a push: what is announced must come, fit, be newer, and arrive as it was sent."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.errors import DigestMismatch, DroppedBucket, StaleVersion, UnknownWeight
from dllm_rl.models.digest import tensor_digests
from dllm_rl.protocols.engine import TensorSpec
from dllm_rl.weight_transfer.receiver import WeightReceiver, buckets, compare, size_of, views_of

VALUES = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2),
    "d": torch.tensor(3.0),
    "e": torch.randn(100),
}
ENTRIES = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in VALUES.items()]


class Sink:
    """As much of an engine as a push looks at."""

    def __init__(self):
        self.values, self.announced = {name: torch.zeros_like(value) for name, value in VALUES.items()}, []

    def begin_weights(self, tensors):
        unknown = [spec.name for spec in tensors if spec.name not in self.values]
        if unknown:
            raise UnknownWeight(f"no weight '{unknown[0]}'")
        self.announced = [spec.name for spec in tensors]

    def write_weights(self, values):
        for name, value in values.items():
            self.values[name].copy_(value)

    def commit_weights(self):
        return tensor_digests((name, self.values[name]) for name in self.announced)


def receiver():
    return WeightReceiver(Sink(), "engine 3")


def buffer_of(bucket):
    buffer = torch.zeros(size_of(bucket), dtype=torch.uint8)
    for name, view in views_of(buffer, bucket).items():
        view.copy_(VALUES[name])
    return buffer


@pytest.mark.parametrize("limit", [1, 64, 100, 128, 1 << 20])
def test_what_is_sent_arrives_in_buckets_of_any_size(limit):
    layout, box = buckets(ENTRIES, limit), receiver()
    assert [entry for bucket in layout for entry in bucket] == ENTRIES
    assert all(size_of(bucket) <= limit or len(bucket) == 1 for bucket in layout)
    box.begin_push(4, layout)
    assert not box.complete
    for number in reversed(range(len(layout))):
        box.write(number, buffer_of(layout[number]))
    sent = tensor_digests(VALUES.items())
    compare("engine 3", sent, box.commit_push(4))
    box.accept()
    assert box.complete and box.step == 4
    for name, value in VALUES.items():
        assert torch.equal(box.engine.values[name], value)


def test_a_bucket_that_does_not_come_is_named():
    layout, box = buckets(ENTRIES, 64), receiver()
    box.begin_push(1, layout)
    for number in range(len(layout)):
        if number != 1:
            box.write(number, buffer_of(layout[number]))
    with pytest.raises(DroppedBucket, match=r"engine 3 received 2 of 3 buckets of step 1; bucket 1 is missing \(b, c"):
        box.commit_push(1)
    assert not box.complete, "half of a push must not be decoded with"


def test_older_weights_are_refused_unless_they_are_meant():
    layout, box = buckets(ENTRIES, 1 << 20), receiver()
    box.begin_push(5, layout)
    box.write(0, buffer_of(layout[0]))
    box.commit_push(5)
    with pytest.raises(StaleVersion, match="engine 3 holds the weights of step 5 and was offered those of 4"):
        box.begin_push(4, layout)
    box.begin_push(5, layout)
    box.begin_push(2, layout, allow_older=True)


def test_what_the_engine_does_not_have_is_refused_before_anything_changes():
    box = receiver()
    with pytest.raises(UnknownWeight, match=r"no weight 'lora\.a'"):
        box.begin_push(0, [[TensorSpec("lora.a", (3, 5), torch.float32)]])
    assert box.complete


def test_a_corrupted_byte_is_found_and_its_tensor_named():
    layout, box = buckets(ENTRIES, 1 << 20), receiver()
    box.begin_push(0, layout)
    buffer = buffer_of(layout[0])
    buffer[64 + 3] ^= 1  # in b
    box.write(0, buffer)
    with pytest.raises(DigestMismatch, match="engine 3 holds other values than were sent in 1 of 5 tensors, first 'b'"):
        compare("engine 3", tensor_digests(VALUES.items()), box.commit_push(0))
