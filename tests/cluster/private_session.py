"""A private Ray run as a process of its own: prints what listens, who is let in, what its raylet's end does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import ray
import torch
import torch.distributed as dist

from dllm_rl.cluster.connection import ray_connection
from dllm_rl.cluster.group import WorkerGroup, WorkerRank
from dllm_rl.cluster.placement import Placement, ResourceRequest
from dllm_rl.cluster.ray_group import RayWorkerGroup
from dllm_rl.errors import RunStopped
from dllm_rl.weight_transfer.broadcast import Broadcast
from dllm_rl.weight_transfer.keyed_store import keyed_store


class Member:
    """Has all that listens in a worker: learners' group of processes, and the one of weights."""

    def __init__(self, rank: WorkerRank) -> None:
        self.rank, self.ticks = rank, 0
        store, _ = keyed_store(rank.address, rank.port, rank.key, leads=rank.rank == 0, timeout_s=60.0)
        dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.size)
        self.transport = Broadcast()

    def open(self) -> object:
        return self.transport.open(self.rank.host, 30.0)

    def join(self, address: object) -> None:
        at = {"rank": self.rank.rank, "size": 2, "host": self.rank.host, "device": torch.device("cpu")}
        self.transport.join(address, timeout_s=30.0, **at)
        dist.all_reduce(torch.ones(1))

    def stay(self) -> None:
        signal.pause()


def listeners() -> list[tuple[str, str]]:
    """(process, address) of every port, TCP and UDP, of this process and its descendants."""
    me, found = psutil.Process(), []
    for process in [me, *me.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or (connection.type == socket.SOCK_DGRAM):
                found.append((process.name(), connection.laddr.ip))
    return found


def visitor(address: str, **token: str) -> str:
    """What somebody is told who asks the GCS for the cluster's nodes."""
    code = f"import ray; print('let in', len(ray._raylet.GcsClient(address={address!r}).get_all_node_info(timeout=5)))"
    command = [sys.executable, "-c", code]
    try:
        asked = subprocess.run(command, env=os.environ | token, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return "no answer"
    return asked.stdout + asked.stderr


def main() -> None:
    """Print one line of JSON."""
    found: dict[str, object] = {}
    with ray_connection("local", "private", 2.0) as watch:
        node = ray._private.worker._global_node
        request = ResourceRequest(count=1, cpus=0.5, gpus=0.0)
        placement = Placement.reserve(
            request, ResourceRequest(count=1, cpus=0.5, gpus=0.0), colocate=False, wait_s=60.0, log=lambda text: None
        )
        slots = [*placement.engines, *placement.learners]
        group: WorkerGroup[Member] = RayWorkerGroup("member", Member, slots, {"OMP_NUM_THREADS": "1"}, watch)
        group.restart([0, 1])
        address = group.submit(0, Member.open).result(60)
        group.call(Member.join, address)
        found["listeners"] = listeners()
        found["owner"] = visitor(node.gcs_address)
        found["stranger"] = visitor(node.gcs_address, RAY_AUTH_TOKEN="0" * 64)
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        found["modes"] = [os.stat(path).st_mode & 0o777 for path in (os.path.dirname(token), token)]
        waiting = group.submit(0, Member.stay)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        try:
            waiting.result(60)
        except RunStopped as error:
            found["lost"] = [type(error).__name__, str(error)]
        try:
            group.restart([0, 1])
        except RunStopped as error:
            found["later"] = type(error).__name__
        group.close()
        watch.unless_lost(placement.close)
    found["token_left"] = os.path.exists(token)
    found["environment_left"] = [name for name in os.environ if name.startswith("RAY_AUTH") or "SOCKET_IFNAME" in name]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
