"""SIGHUP: the configuration is read again, and what may change without touching a pool is in force from then on.

That is the log's level, the token and the policy. Everything else waits for a restart, and is named. A file that cannot be used
changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from pool_managerd.api.auth import Access, resolve_access, with_local_token
from pool_managerd.api.server import ApiServer
from pool_managerd.config import Config
from pool_managerd.errors import PoolError
from pool_managerd.node import PoolManager
from pool_managerd.telemetry.logs import Logging

IN_FORCE_AT_ONCE = ("policy", "auth", "telemetry.log_level")
MAX_NAMED = 8
TOKEN_GRACE_S = 300.0
"""How long the token holds that was replaced (SPEC §20 no. 56): callers change theirs one after the other."""


class Rereading:
    """Call it to read again. ``read`` gives the configuration as a start would have it, and raises PoolError."""

    def __init__(
        self, read: Callable[[], Config], env: Mapping[str, str], node: PoolManager, server: ApiServer, logs: Logging
    ) -> None:
        self._read, self._env, self._node, self._server, self._logs = read, env, node, server, logs
        self._running: asyncio.Task[None] | None = None
        self._again = False

    def __call__(self) -> None:
        """Asked while one is under way, it is done once more after that."""
        if self._running is not None and not self._running.done():
            self._again = True
            return
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self._again = False
            try:
                self._apply(await asyncio.to_thread(self._read))
            except PoolError as problem:
                human = f"The configuration cannot be read again, so everything stays as it was: {problem.message}"
                self._node.events.emit("config_reread", human, level="error", outcome="error", hint=problem.hint)
            if not self._again:
                return

    def _apply(self, new: Config) -> None:
        access, token = resolve_access(new, self._env)
        access = with_local_token(access, self._node.config.daemon.state_dir)
        waiting = [key for key in changed_keys(self._node.config, new) if not key.startswith(IN_FORCE_AT_ONCE)]
        if token is not None:
            self._node.events.redactor.know("auth", [*self._node.events.redactor.known("auth", 8), token.value])
        self._use(access)
        self._logs.use_level(new.telemetry.log_level)
        self._node.use_policy(new.policy)
        human = "The configuration was read again; the log's level, the token and the policy are in force"
        if waiting:
            more = f" and {len(waiting) - MAX_NAMED} more" if len(waiting) > MAX_NAMED else ""
            human += f". These wait for a restart: {', '.join(waiting[:MAX_NAMED])}{more}"
        self._node.events.emit("config_reread", human, outcome="success", waiting=waiting)

    def _use(self, access: Access) -> None:
        before = self._server.access
        if access.token_digest == before.token_digest:
            access = replace(access, former_digest=before.former_digest)
        elif before.token_digest is not None:
            access = replace(access, former_digest=before.token_digest)
            asyncio.get_running_loop().call_later(TOKEN_GRACE_S, self._forget_former, before.token_digest)
        self._server.use_access(access)

    def _forget_former(self, digest: bytes) -> None:
        if self._server.access.former_digest == digest:
            self._server.use_access(replace(self._server.access, former_digest=None))


def changed_keys(old: BaseModel, new: BaseModel, path: str = "") -> Iterator[str]:
    """The keys whose values differ, as they are written: ``daemon.bind``; a list counts as one key."""
    for name in type(old).model_fields:
        before: Any = getattr(old, name)
        after: Any = getattr(new, name)
        key = f"{path}{name}"
        if isinstance(before, BaseModel) and type(after) is type(before):
            yield from changed_keys(before, after, f"{key}.")
        elif before != after:
            yield key
