"""Which pool served a session last: its engine has read what the session's next request begins with."""

from __future__ import annotations

MOST = 4096


class Sessions:
    """The last ``most`` that were served, by a digest of their names."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._served: dict[bytes, str] = {}
        """Those that were served last are at the end."""

    def __len__(self) -> int:
        return len(self._served)

    def last(self, session: bytes) -> str | None:
        """The pool that served it last; None: not known."""
        return self._served.get(session)

    def served(self, session: bytes, pool_id: str) -> None:
        """By that pool, now. The one that nothing was heard of for longest is forgotten where there are too many."""
        self._served.pop(session, None)
        self._served[session] = pool_id
        if len(self._served) > self._most:
            del self._served[next(iter(self._served))]
