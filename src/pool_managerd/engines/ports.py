"""Ports for engines: each pool keeps its own, and none is handed out while something listens on it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from itertools import chain

from pool_managerd.errors import NodeError


class PortAllocator:
    """Hands out ports of a range such as ``8080-8999``, from the bottom up.

    A port stays claimed until it is released, so two pools never share one. Between the check and the engine's bind
    another program may still take it.
    """

    def __init__(self, ports: str) -> None:
        low, _, high = ports.partition("-")
        self._range = range(int(low), int(high) + 1)
        self._claimed: dict[str, int] = {}

    def claim(self, pool_id: str, preferred: Sequence[int] = ()) -> int:
        """A free port for the pool, from ``preferred`` first; it replaces the pool's earlier claim.

        The port it had is taken again when it is still free. Raises NodeError when no port is left.
        """
        had = self._claimed.pop(pool_id, None)
        taken = self.all_claimed()
        # The pool's own ports come first, in their order; without any the one it used last, so that its URL is steady.
        for port in chain(preferred or ([] if had is None else [had]), self._range):
            if port not in taken and is_free(port):
                self._claimed[pool_id] = port
                return port
        raise NodeError(
            f"cannot find a free port for pool {pool_id}: all of {self._range.start}-{self._range.stop - 1} are in use",
            pool_id=pool_id,
            hint="widen daemon.engine_ports, or stop what listens there (ss -ltnp shows it)",
        )

    def release(self, pool_id: str) -> None:
        """Give the pool's port back; one without a port is no error."""
        self._claimed.pop(pool_id, None)

    def all_claimed(self) -> frozenset[int]:
        return frozenset(self._claimed.values())


def is_free(port: int) -> bool:
    """True when nothing listens on the loopback port now. A connection that lingers from an earlier listener does not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
