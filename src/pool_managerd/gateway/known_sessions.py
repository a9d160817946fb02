"""Which pool served a session last, whichever worker had it: its engine has read what the session's next request begins with."""

from __future__ import annotations

import struct

from pool_managerd.gateway.common_memory import CommonMemory

_ROW = struct.Struct("<16sH63sx")
_ROWS = 16_384
SIZE = _ROWS * _ROW.size


class KnownSessions:
    """By digests of 16 bytes. Each has one place, where the last one of that place stays: some are forgotten early, and what two
    workers write at the same moment may be the pool of another session. So a pool is asked only where it has the model.
    """

    def __init__(self, memory: CommonMemory | None = None) -> None:
        self._bytes = (memory or CommonMemory(SIZE)).bytes

    def last(self, session: bytes) -> str | None:
        """The pool that served it last; None: not known."""
        known, length, pool_id = _ROW.unpack_from(self._bytes, _place(session))
        return pool_id[:length].decode("utf-8", "replace") if known == session and length else None

    def served(self, session: bytes, pool_id: str) -> None:
        """By that pool, now."""
        raw = pool_id.encode()
        _ROW.pack_into(self._bytes, _place(session), session, len(raw), raw)


def _place(session: bytes) -> int:
    return int.from_bytes(session[:4], "little") % _ROWS * _ROW.size
