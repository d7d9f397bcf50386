"""The transports that a process uses."""

from __future__ import annotations

from dllm_rl.config.plugins import plugin_class
from dllm_rl.protocols.transport import Transport

STORE = "object_store"  # where pushes are kept for engines that are built anew


class Transports(dict[str, Transport]):
    """Made when they are first used."""

    def __missing__(self, name: str) -> Transport:
        made = self[name] = plugin_class("transports", name)()
        return made

    def release(self) -> None:
        """See Transport."""
        for transport in self.values():
            transport.release()
