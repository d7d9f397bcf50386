import psutil
import pytest
import torch
from torch import nn

from dllm_rl.models.offload import Offloader


def test_tensors_are_away_and_come_back_in_place():
    layer = nn.Linear(7, 5)
    tied = nn.Linear(7, 5)
    tied.weight = layer.weight
    tensors = [p.data for p in (*layer.parameters(), *tied.parameters())]
    before = [t.clone() for t in tensors]
    sleeper = Offloader(tensors)
    for _ in range(2):
        sleeper.sleep()
        sleeper.sleep()
        assert sleeper.asleep and all(t.untyped_storage().nbytes() == 0 for t in tensors)
        sleeper.wake()
        sleeper.wake()
        assert not sleeper.asleep
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
        assert torch.equal(layer.weight, before[0]), "the parameters themselves"
        with torch.no_grad():
            layer.weight.add_(1)
        before = [t.clone() for t in tensors]


def test_memory_is_given_back():
    tensor = torch.ones(1 << 26)  # 256 MB
    sleeper, process = Offloader([tensor]), psutil.Process()
    awake = process.memory_info().rss
    sleeper.sleep()
    assert process.memory_info().rss < awake + (1 << 25), "the copy in host memory alone is left"
    sleeper.wake()
    assert float(tensor.sum()) == 1 << 26


@pytest.mark.gpu
def test_a_device_gets_its_memory_back():
    tensor = torch.ones(1 << 26, device="cuda")
    sleeper, awake = Offloader([tensor]), torch.cuda.memory_reserved()
    sleeper.sleep()
    assert torch.cuda.memory_reserved() <= awake - (1 << 28)
    sleeper.wake()
    assert float(tensor.sum()) == 1 << 26
