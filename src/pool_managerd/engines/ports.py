"""Ports for engines: each replica of a pool keeps its own, and none is handed out while something listens on it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.errors import NodeError

LOOPBACK = "127.0.0.1"


class PortAllocator:
    """Hands out ports of a range such as ``8080-8999``, from the bottom up; the ``fixed`` ones of other pools last.

    A port stays claimed until it is released, so two instances never share one. Between the check and the engine's bind
    another program may still take it.
    """

    def __init__(self, ports: str, fixed: frozenset[int] = frozenset()) -> None:
        low, _, high = ports.partition("-")
        self._range = range(int(low), int(high) + 1)
        self.fixed = fixed
        self._claimed: dict[InstanceId, int] = {}

    def claim(self, instance: InstanceId, preferred: Sequence[int] = ()) -> int:
        """A free port for ``instance``, from ``preferred`` first; it replaces the instance's earlier claim.

        The port it had is taken again when it is still free. Raises NodeError when no port is left.
        """
        had = self._claimed.pop(instance, None)
        taken = self.all_claimed()
        for port in self._candidates(had, preferred):
            if port not in taken and is_free(port):
                self._claimed[instance] = port
                return port
        raise NodeError(
            f"cannot find a free port for pool {instance.pool_id}: all of {self._range.start}-{self._range.stop - 1} are in use",
            pool_id=instance.pool_id,
            hint="widen daemon.engine_ports, or stop what listens there (ss -ltnp shows it)",
        )

    def keep(self, instance: InstanceId, port: int) -> None:
        """``port`` is the instance's already: its engine runs, and was left by an earlier daemon."""
        self._claimed[instance] = port

    def release(self, instance: InstanceId) -> None:
        """Give the instance's port back; one without a port is no error."""
        self._claimed.pop(instance, None)

    def forget(self, pool_id: str) -> None:
        """Give back what every replica of a pool has."""
        for instance in [instance for instance in self._claimed if instance.pool_id == pool_id]:
            self.release(instance)

    def all_claimed(self) -> frozenset[int]:
        """The ports of all instances."""
        return frozenset(self._claimed.values())

    def _candidates(self, had: int | None, preferred: Sequence[int]) -> Iterator[int]:
        # The pool's own ports come first, in their order; then the one it used last, so that its URL is steady.
        yield from preferred
        if had is not None and not preferred:
            yield had
        yield from (port for port in self._range if port not in self.fixed)
        yield from (port for port in self._range if port in self.fixed)


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """True when nothing listens on the port now. A connection that lingers from an earlier listener does not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
