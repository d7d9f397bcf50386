"""Where workers of a Ray run go: one placement group, checked beforehand and waited for with an explanation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from dllm_rl.errors import UserError

SAY_EVERY_S = 10.0  # a run that waits without a word looks as if it hung
Bundle = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place for one worker.

    Attributes:
        placement: the placement group.
        bundle: index of its bundle.
        cpus: CPU share of the worker.
        gpus: GPU share of the worker; two workers of one bundle may share a device.
    """

    placement: PlacementGroup
    bundle: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRequest:
    """What a kind of worker needs.

    Attributes:
        count: workers.
        cpus: CPUs of each.
        gpus: GPUs of each, a fraction where several share one.
    """

    count: int
    cpus: float
    gpus: float


class Placement:
    """The places of engines and learners; given back on close."""

    def __init__(self, group: PlacementGroup, engines: list[Slot], learners: list[Slot]) -> None:
        self.group, self.engines, self.learners = group, engines, learners

    @staticmethod
    def reserve(
        engines: ResourceRequest,
        learners: ResourceRequest,
        *,
        colocate: bool,
        wait_s: float,
        log: Callable[[str], None],
    ) -> Placement:
        """Reserve places for all workers at once.

        Args:
            engines: what engines need.
            learners: what learners need.
            colocate: engine i and learner i on the same devices, as far as there are both.
            wait_s: how long to wait for other jobs to give resources back.
            log: told every ten seconds what is wanted and what is free.
        Raises:
            UserError: the cluster is too small, or the places were not free in time.
        """
        bundles, at = _bundles(engines, learners, colocate)
        _preflight(bundles)
        group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
        try:
            _wait(group, bundles, wait_s, log)
            order = _by_node(group)
        except BaseException:
            remove_placement_group(group)
            raise
        # Engine and learner numbers follow the nodes, so that neighbours in rank are neighbours on the network.
        rank = {bundle: place for place, bundle in enumerate(order)}
        slots: dict[str, list[Slot]] = {"engine": [], "learner": []}
        for kind, needs in (("engine", engines), ("learner", learners)):
            for bundle in sorted(at[kind], key=rank.__getitem__):
                slots[kind].append(Slot(placement=group, bundle=bundle, cpus=needs.cpus, gpus=needs.gpus))
        return Placement(group, slots["engine"], slots["learner"])

    def close(self) -> None:
        """Give the resources back."""
        remove_placement_group(self.group)


def _bundles(
    engines: ResourceRequest, learners: ResourceRequest, colocate: bool
) -> tuple[list[Bundle], dict[str, list[int]]]:
    """Bundles, and which of them hold an engine and which a learner."""
    one = {"engine": _resources(engines), "learner": _resources(learners)}
    shared = min(engines.count, learners.count) if colocate else 0
    both = {name: one["engine"].get(name, 0) + one["learner"].get(name, 0) for name in ("CPU", "GPU")}
    bundles: list[Bundle] = [{name: value for name, value in both.items() if value}] * shared
    at = {"engine": list(range(shared)), "learner": list(range(shared))}
    for kind, needs in (("engine", engines), ("learner", learners)):
        for _ in range(needs.count - shared):
            at[kind].append(len(bundles))
            bundles.append(one[kind])
    return bundles, at


def _resources(needs: ResourceRequest) -> dict[str, float]:
    return {name: value for name, value in (("CPU", needs.cpus), ("GPU", needs.gpus)) if value}


def _total(bundles: Sequence[Bundle]) -> dict[str, float]:
    return {name: sum(b.get(name, 0) for b in bundles) for name in ("CPU", "GPU")}


def _preflight(bundles: Sequence[Bundle]) -> None:
    """Refuse at once what no amount of waiting gives."""
    there, wanted = ray.cluster_resources(), _total(bundles)
    for name, value in wanted.items():
        if value > there.get(name, 0):
            raise UserError(
                f"the run wants {value:g} {name}s ({_listed(bundles)}), the whole Ray cluster has "
                f"{there.get(name, 0):g}; lower cluster.engines, cluster.learners or their {name.lower()}s, or set "
                f"cluster.colocate: true"
            )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for bundle in bundles:
        if not any(all(node.get(name, 0) >= value for name, value in bundle.items()) for node in nodes):
            raise UserError(
                f"no node of the Ray cluster is large enough for {_listed([bundle])} in one place; lower "
                f"cluster.cpus_per_engine, cluster.cpus_per_learner or the GPU shares"
            )


def _wait(group: PlacementGroup, bundles: Sequence[Bundle], wait_s: float, log: Callable[[str], None]) -> None:
    deadline = time.monotonic() + wait_s
    while not group.wait(math.ceil(min(SAY_EVERY_S, max(1.0, deadline - time.monotonic())))):  # whole seconds only
        text = f"wanted {_listed(bundles)}; free: {_free()}"
        if time.monotonic() >= deadline:
            raise UserError(
                f"the Ray cluster did not free enough within cluster.wait_s = {wait_s:g} s: {text}; stop other jobs "
                f"('ray list placement-groups' shows them), ask for less, or raise cluster.wait_s"
            )
        log(f"waiting for the Ray cluster: {text}")


def _by_node(group: PlacementGroup) -> list[int]:
    """Bundle numbers, those of one node together."""
    node_of: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return sorted(node_of, key=lambda bundle: (address.get(node_of[bundle], ""), node_of[bundle], bundle))


def _free() -> str:
    """Free resources of each node, as far as Ray tells."""
    # Private, but the only call that tells nodes apart: ray.available_resources() adds them up, and a sum of free CPUs
    # does not explain why no node has enough.
    available: Mapping[str, Mapping[str, Any]] = ray._private.state.available_resources_per_node()
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    cells = []
    for node, address in names.items():
        free = available.get(node, {})
        cells.append(f"{address} {free.get('CPU', 0):g} CPU {free.get('GPU', 0):g} GPU")
    return ", ".join(cells) or "no node is alive"


def _listed(bundles: Sequence[Bundle]) -> str:
    kinds: dict[str, int] = {}
    for bundle in bundles:
        text = " + ".join(f"{value:g} {name}" for name, value in bundle.items())
        kinds[text] = kinds.get(text, 0) + 1
    return ", ".join(f"{count} x ({text})" for text, count in kinds.items())
