"""What is counted by name, over all workers of a gateway: requests at once, and tokens of a day."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from pool_managerd.errors import NodeError
from pool_managerd.gateway.common_memory import CommonMemory

MAX_WORKERS = 64
_HEAD = struct.Struct("<q")
_NAME, _NAME_BYTES = struct.Struct("<H6x256s"), 256
_TOKENS = struct.Struct("<q")
_AT_WORK = struct.Struct(f"<{MAX_WORKERS}i")
_OF_ONE = struct.Struct("<i")
_TOKENS_AT = _NAME.size
_AT_WORK_AT = _TOKENS_AT + _TOKENS.size
_ROW = _AT_WORK_AT + _AT_WORK.size
_ROWS, _PLACES = 4096, 64
"""Rows in all, and those in which a name may be."""
SIZE = _HEAD.size + _ROWS * _ROW


class Tally:
    """``worker`` is the number of this process among those that have ``memory`` in common; what an earlier one of that number
    had begun is over.
    """

    def __init__(self, memory: CommonMemory | None = None, worker: int = 0) -> None:
        self.memory = memory or CommonMemory(SIZE)
        self._bytes, self._own = self.memory.bytes, worker * _OF_ONE.size
        with self.memory.alone():
            for row in self._taken():
                _OF_ONE.pack_into(self._bytes, row + _AT_WORK_AT + self._own, 0)

    def at_work(self, name: str) -> int:
        """How many of that name have begun, and are not over."""
        with self.memory.alone():
            row = self._find(name)
            return 0 if row is None else sum(_AT_WORK.unpack_from(self._bytes, row + _AT_WORK_AT))

    def begin(self, name: str, most: float) -> bool:
        """One more of that name; False, and nothing is counted, where ``most`` are at work already."""
        with self.memory.alone():
            at = self._row(name) + _AT_WORK_AT
            if sum(_AT_WORK.unpack_from(self._bytes, at)) >= most:
                return False
            self._add(at, 1)
            return True

    def end(self, name: str) -> None:
        """One that has begun is over."""
        with self.memory.alone():
            self._add(self._row(name) + _AT_WORK_AT, -1)

    def _add(self, at: int, more: int) -> None:
        (before,) = _OF_ONE.unpack_from(self._bytes, at + self._own)
        _OF_ONE.pack_into(self._bytes, at + self._own, before + more)

    # --- tokens ---

    @property
    def day(self) -> int:
        """Whose tokens are counted; 0: none's yet."""
        return int(_HEAD.unpack_from(self._bytes, 0)[0])

    def begin_day(self, day: int) -> bool:
        """All that was counted was of another day: False where that is not so. Names that nothing is known of are forgotten."""
        with self.memory.alone():
            if self.day == day:
                return False
            for row in self._taken():
                _TOKENS.pack_into(self._bytes, row + _TOKENS_AT, 0)
                if not any(_AT_WORK.unpack_from(self._bytes, row + _AT_WORK_AT)):
                    _NAME.pack_into(self._bytes, row, 0, b"")
            _HEAD.pack_into(self._bytes, 0, day)
            return True

    def tokens(self, name: str) -> int:
        with self.memory.alone():
            row = self._find(name)
            return 0 if row is None else int(_TOKENS.unpack_from(self._bytes, row + _TOKENS_AT)[0])

    def spend(self, name: str, tokens: int) -> None:
        with self.memory.alone():
            at = self._row(name) + _TOKENS_AT
            _TOKENS.pack_into(self._bytes, at, _TOKENS.unpack_from(self._bytes, at)[0] + tokens)

    def spent(self) -> dict[str, int]:
        """By every name."""
        with self.memory.alone():
            found = {row: int(_TOKENS.unpack_from(self._bytes, row + _TOKENS_AT)[0]) for row in self._taken()}
            return {self._name(row).decode("utf-8", "replace"): tokens for row, tokens in found.items() if tokens}

    # --- rows ---

    def _row(self, name: str) -> int:
        """Raises NodeError where there is no room for one more name."""
        row = self._find(name)
        if row is None:
            row = next((place for place in _places(_encoded(name)) if not self._name(place)), None)
            if row is None:
                raise NodeError("cannot count for one more name", code="TOO_MANY_REQUESTS", retry_after_ms=1000)
            raw = _encoded(name)
            _NAME.pack_into(self._bytes, row, len(raw), raw)
        return row

    def _find(self, name: str) -> int | None:
        raw = _encoded(name)
        return next((place for place in _places(raw) if self._name(place) == raw), None)

    def _name(self, row: int) -> bytes:
        length, raw = _NAME.unpack_from(self._bytes, row)
        return bytes(raw[:length])

    def _taken(self) -> Iterator[int]:
        return (row for row in range(_HEAD.size, SIZE, _ROW) if self._bytes[row : row + 2] != b"\0\0")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")[:_NAME_BYTES]


def _places(raw: bytes) -> Iterator[int]:
    first = zlib.crc32(raw)
    return (_HEAD.size + (first + step) % _ROWS * _ROW for step in range(_PLACES))
