"""Pushes between real actors, by every transport, and what is said when one goes wrong."""

from __future__ import annotations

import functools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dllm_rl.cluster.ray_group import RayWorkerGroup
from dllm_rl.conformance import cases
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.driver.weight_sync import DistributedWeightSync
from dllm_rl.errors import (
    DigestMismatch,
    DroppedBucket,
    PushError,
    PushTimeout,
    RunStopped,
    StaleVersion,
    UnknownWeight,
)
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.digest import digest
from dllm_rl.models.lora import add_lora
from dllm_rl.protocols.engine import EngineSetup, TensorSpec
from dllm_rl.types import Prompt, Sampling
from dllm_rl.weight_transfer.receiver import size_of
from dllm_rl.workers.engine_worker import EngineWorker
from dllm_rl.workers.learner_worker import LearnerWorker
from rollouts.native import NativeEngine

PROMPT = Prompt(uid="p", token_ids=(5, 6), text="", answer="", task="")
ENV = {"OMP_NUM_THREADS": "1"}


def shake(module, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


class Weights:
    """As much of a learner as a push looks at."""

    step = ticks = 0
    reading = TorchLearner.reading

    def __init__(self, denoiser):
        self.named = [(n, p) for n, p in denoiser.module.named_parameters() if p.requires_grad]

    def named_weights(self):
        return iter(self.named)


class Sender(LearnerWorker):
    """A learner rank whose weights can be shaken, and which can be made to misbehave."""

    fault = ""

    def shake(self, seed):
        shake(self._denoiser.module, seed)

    def version_now(self):
        return digest(self.learner.named_weights())

    def misbehave(self, fault):
        self.fault = fault

    def tensor_specs(self):
        found = super().tensor_specs()
        if self.fault == "wrong name":
            found[0] = TensorSpec(found[0].name.replace("default", "other"), found[0].shape, found[0].dtype)
        return found

    def send(self, bucket, transport, *, keep):
        if self.fault == "hang":
            time.sleep(4)
        return super().send(bucket, transport, keep=keep)


class Receiver(EngineWorker):
    """An engine that can be made to lose or to garble what it receives."""

    fault = ""

    def misbehave(self, fault):
        self.fault = fault

    def receive(self, number, transport, payload):
        if self.fault == "dropped bucket" and number == 1:
            size = size_of(self.layout[number])
            self._transports[transport].receive(payload, size, self.engine.device)
            return
        super().receive(number, transport, payload)
        if self.fault == "corrupted byte" and number == 1:
            name = self.layout[1][0].name
            self.engine._parameters[name].view(-1).view(torch.uint8)[5] ^= 1


class Detached(NativeEngine):
    """Writes weights into copies that nothing decodes with: the bug that the first act is there for."""

    def __init__(self, config, setup):
        super().__init__(config, setup)
        self._parameters = {name: value.clone() for name, value in self._parameters.items()}


def sender(lora, rank):
    denoiser = cases.denoiser("tiny")
    if lora:
        add_lora(denoiser, rank=4, alpha=8.0, seed=1)
    return Sender(Weights(denoiser), rank, denoiser, merged=lora == "merged")


def model(lora):
    denoiser = cases.denoiser("tiny")
    if lora in ("adapter", "detached"):
        add_lora(denoiser, rank=4, alpha=8.0, seed=1)
    return denoiser, cases.tokenizer()


def engine(lora, rank=0):
    kind = Detached if lora == "detached" else NativeEngine
    setup = EngineSetup(
        rank=rank,
        path="",
        strategies={"train": {"name": "low_confidence"}},
        trains=frozenset({"model"}),
        load=functools.partial(model, lora),
    )
    return kind(kind.Config(), setup)


def receiver(lora, rank):
    return Receiver(engine(lora, rank.rank), rank, packed=True)


class Pair:
    """One sender and two receivers with a sync between them."""

    def __init__(self, places, lora):
        self.senders = RayWorkerGroup("learner", functools.partial(sender, lora), places.learners, ENV)
        self.receivers = RayWorkerGroup("engine", functools.partial(receiver, lora), places.engines, ENV)
        with ThreadPoolExecutor(2) as both:
            for started in [both.submit(g.restart, range(g.size)) for g in (self.senders, self.receivers)]:
                started.result()
        self.said = []
        self.learner = LearnerGroup(self.senders, hang_s=60, max_restarts=1)
        self.pool = EnginePool(self.receivers, rows_per_call=8, hang_s=60, max_restarts=1, log=self.said.append)

    def sync(self, transport, timeout_s=60.0):
        return DistributedWeightSync(
            self.learner,
            self.pool,
            transport=transport,
            bucket_bytes=4096,
            timeout_s=timeout_s,
            log=self.said.append,
        )

    def close(self):
        self.senders.close()
        self.receivers.close()


@pytest.fixture(scope="module")
def pair(places):
    made = Pair(places, "adapter")
    yield made
    made.close()


@pytest.fixture
def well(pair):
    """The pair, behaving; afterwards it behaves again and its engines hold what the learner has."""
    yield pair
    for group in (pair.senders, pair.receivers):
        group.call(Sender.misbehave, "")
    pair.sync("object_store").push(allow_older=True)


@pytest.mark.parametrize("transport", ["broadcast", "object_store"])
def test_engines_decode_with_what_was_pushed_and_say_which_version(well, transport):
    sync = well.sync(transport)
    sync.verify()
    before = well.receivers.call(Receiver.probe_logits)
    well.senders.call(Sender.shake, 7)
    assert torch.equal(well.receivers.call(Receiver.probe_logits)[0], before[0]), "nothing has been pushed yet"
    version = sync.push()
    after = well.receivers.call(Receiver.probe_logits)
    lora = {name: p for name, p in model("adapter")[0].module.named_parameters() if ".lora_" in name}
    assert sync.bytes_sent >= sum(p.nbytes for p in lora.values()), "all of the adapter"
    assert sync.bytes_sent < 2 * sum(p.nbytes for p in lora.values()), "and the adapter alone"
    assert not torch.allclose(after[0], before[0]) and torch.equal(after[0], after[1])
    assert well.pool.weights == version and version.digest == well.senders.call(Sender.version_now)[0]
    assert not well.said


def test_two_pushes_of_the_same_weights_have_the_same_digest(well):
    assert well.sync("broadcast").push() == well.sync("object_store").push()


@pytest.mark.parametrize("transport", ["broadcast", "object_store"])
@pytest.mark.parametrize(
    ("who", "fault", "error", "message"),
    [
        (
            "receivers",
            "dropped bucket",
            DroppedBucket,
            r"engine [01] received \d+ of \d+ buckets .* bucket 1 is missing",
        ),
        ("receivers", "corrupted byte", DigestMismatch, r"engine [01] holds other values than were sent in 1 of \d+"),
        ("senders", "wrong name", UnknownWeight, r"engine [01] has no weight '.*lora_A.other.weight'"),
    ],
)
def test_a_push_that_goes_wrong_is_named_and_the_engine_gets_no_prompt(well, transport, who, fault, error, message):
    sync = well.sync(transport)
    sync.push()
    getattr(well, who).call(Sender.misbehave, fault)
    with pytest.raises(error, match=message):
        sync.push()
    if who == "receivers":
        sampling = Sampling(max_new_tokens=4)
        with pytest.raises(RunStopped, match="holds an unfinished push of weights and decodes nothing"):
            well.pool.generate([PROMPT], sampling, role="train", seed=0)


def test_stale_weights_are_refused(well):
    sync = well.sync("object_store")
    well.learner.step = 5
    sync.push()
    well.learner.step = 4
    with pytest.raises(StaleVersion, match=r"engine [01] holds the weights of step 5 and was offered those of 4"):
        sync.push()
    well.learner.step = 0


def test_who_does_not_take_part_is_named_with_phase_and_tensor(well):
    sync = well.sync("object_store", timeout_s=1.0)
    well.senders.call(Sender.misbehave, "hang")
    with pytest.raises(PushTimeout, match=r"learner 0 did not finish 'send' of .*lora_A.* within 1 s"):
        sync.push()


def test_an_engine_that_is_killed_in_a_push_is_replaced_and_served(well):
    sync = well.sync("broadcast")
    sync.push()
    os.kill(well.receivers.pids()[1], signal.SIGKILL)
    well.senders.call(Sender.shake, 3)
    version = sync.push()
    first, second = well.receivers.call(Receiver.probe_logits)
    assert torch.equal(first, second) and well.pool.restarts == 1
    assert version.digest == well.senders.call(Sender.version_now)[0]
    assert "engine 1 is lost" in well.said[0]
    well.said.clear()


def test_a_sampler_that_does_not_look_at_the_adapter_is_found_out(more_places):
    made = Pair(more_places, "detached")
    try:
        with pytest.raises(PushError, match="its logits do not change when the adapter that it is sent does"):
            made.sync("broadcast").verify()
    finally:
        made.close()


def test_merged_layers_make_a_plain_engine_compute_what_the_adapted_learner_does(more_places):
    made = Pair(more_places, "merged")
    try:
        sync = made.sync("broadcast")
        sync.verify()
        made.senders.call(Sender.shake, 1)
        sync.push()
        adapted = cases.denoiser("tiny")
        add_lora(adapted, rank=4, alpha=8.0, seed=1)
        shake(adapted.module, 1)
        adapter = engine("adapter")
        adapter.denoiser = adapted
        wanted = adapter.probe_logits()
        torch.testing.assert_close(made.receivers.call(Receiver.probe_logits)[0], wanted, rtol=1e-4, atol=1e-4)
    finally:
        made.close()
