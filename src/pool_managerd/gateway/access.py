"""Who asks, for which models, and how much at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from pool_managerd.errors import RequestError
from pool_managerd.gateway.budgets import Budgets
from pool_managerd.gateway.directory import Place
from pool_managerd.gateway.keys import KEY_HEADERS, Key, KeyFile
from pool_managerd.gateway.tally import Tally
from pool_managerd.httpd.guard import guarded


@dataclass(frozen=True, slots=True)
class Caller:
    """``key`` None: keys are not asked for. ``tally`` counts the running requests of each key, ``budgets`` its tokens."""

    key: Key | None
    tally: Tally
    budgets: Budgets | None = None

    @property
    def name(self) -> str | None:
        """Of its key."""
        return None if self.key is None else self.key.name

    def may_ask(self, model: str) -> bool:
        return self.key is None or not self.key.models or model in self.key.models

    def may_see(self, place: Place) -> bool:
        """It may ask for it by one of its names."""
        return any(self.may_ask(name) for name in place.names)

    def require(self, model: str) -> None:
        """Raises RequestError 403 for a model that the key does not have."""
        if self.key is not None and not self.may_ask(model):
            raise RequestError(
                f"cannot use model {model[:80]!r} with the API key '{self.key.name}'", code="POLICY_DENIED", status=403,
                hint=f"it may ask for: {', '.join(self.key.models)}",
            )  # fmt: skip

    @contextmanager
    def asking(self, model: str) -> Iterator[None]:
        """While a request runs. Raises RequestError 403, or 429 for more at once, or in a day, than the key may have."""
        self.require(model)
        if self.key is None:
            yield
            return
        if self.budgets is not None:
            self.budgets.require(self.key)
        name, most = self.key.name, self.key.concurrency
        if most is None:
            yield
            return
        if not self.tally.begin(name, most):
            raise RequestError(
                f"cannot serve more than {most} requests at once for the API key '{name}'", code="TOO_MANY_REQUESTS", status=429,
                retriable=True, retry_after_ms=1000,
            )  # fmt: skip
        try:
            yield
        finally:
            self.tally.end(name)


_NONE = frozenset[bytes]()


@dataclass(slots=True)
class Access:
    """``keys`` None: whoever reaches the gateway may use it."""

    keys: KeyFile | None = None
    budgets: Budgets | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def withheld(self) -> frozenset[bytes]:
        """Headers that engines are not to see, in lower case."""
        return _NONE if self.keys is None else KEY_HEADERS

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Raises RequestError 401 for one without a key that holds now."""
        return Caller(None if self.keys is None else self.keys.named_by(headers), self.tally, self.budgets)


def require_own_user(request: web.Request, what: str) -> None:
    """For what is not for everybody on this machine, where keys are not asked for. Raises RequestError 401."""
    connection = guarded(request.transport)
    uid = None if connection is None else connection.peer_uid()
    if uid not in (0, os.geteuid()):
        who = "an unknown user" if uid is None else f"uid {uid}"
        raise RequestError(
            f"cannot show {who} {what}: without API keys it is for the gateway's own user and root",
            code="MISSING_TOKEN", status=401, hint="set gateway.keys_file, and send a key",
        )  # fmt: skip
