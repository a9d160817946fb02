"""Which session a request is of: what its client says, and whose it is, so that nobody steers the requests of others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from pool_managerd.gateway.asked import Asked


@dataclass(frozen=True, slots=True)
class SessionNames:
    """``headers`` that may name a session, the first that is there counts; then ``prompt_cache_key`` of the body. Without any
    no request is of a session.
    """

    headers: tuple[str, ...] = ()

    def of(self, given: Mapping[str, str], asked: Asked, caller: str | None) -> bytes | None:
        """A digest of the session that a request is of; None: of none. ``caller`` is the name of its key."""
        if not self.headers:
            return None
        named = next((value for name in self.headers if (value := given.get(name))), None) or asked.session
        if not named:
            return None
        told = repr((caller, asked.model, named)).encode()
        return hashlib.blake2b(told, digest_size=16).digest()
