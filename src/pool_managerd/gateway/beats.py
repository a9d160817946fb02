"""Signs of life of the workers of a gateway, in memory that whoever keeps them running maps, too."""

from __future__ import annotations

import struct
import time

from pool_managerd.gateway.common_memory import CommonMemory
from pool_managerd.gateway.tally import MAX_WORKERS

_AT = struct.Struct("<d")
SIZE = MAX_WORKERS * _AT.size


class Beats:
    """By a worker's number. Monotonic seconds of this boot."""

    def __init__(self, memory: CommonMemory) -> None:
        self._bytes = memory.bytes

    def beat(self, worker: int) -> None:
        """It is alive: its loop turns."""
        _AT.pack_into(self._bytes, worker * _AT.size, time.monotonic())

    def forget(self, worker: int) -> None:
        """Another one begins."""
        _AT.pack_into(self._bytes, worker * _AT.size, 0.0)

    def last(self, worker: int) -> float:
        """When it was heard of last; 0: not yet."""
        return float(_AT.unpack_from(self._bytes, worker * _AT.size)[0])
