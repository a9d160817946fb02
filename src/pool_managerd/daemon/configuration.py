"""The daemon's own configuration file, applied while it runs: by a request, a signal, or because it has changed.

The file has the last word: whatever is applied is in it first, so that the next daemon starts with the same. A text that comes
with a request, and one of the history, therefore take the file's place before anything else happens.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pool_managerd.api.auth import Access, resolve_access, with_local_token
from pool_managerd.api.server import ApiServer
from pool_managerd.config import Config
from pool_managerd.config.plan import Plan
from pool_managerd.config.schema import not_in_force
from pool_managerd.config.source import ConfigSource
from pool_managerd.config.withheld import taken_out
from pool_managerd.errors import PoolError
from pool_managerd.node import PoolManager
from pool_managerd.supervision.applied import NOT_APPLIED
from pool_managerd.supervision.apply import ApplyOptions, summary
from pool_managerd.supervision.operations import Operation
from pool_managerd.telemetry.logs import Logging
from pool_managerd.telemetry.metrics import Metrics

TOKEN_GRACE_S = 300.0
"""How long the token holds that was replaced (SPEC §20 no. 56): callers change theirs one after the other."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A text, the configuration that it says, and whether it is to take the file's place.

    ``edited`` is what the file says now where that was never applied and would be lost, None where it was, or is to be. It is
    kept in the history where ``edited_config``, what it says, is known.
    """

    text: str
    config: Config
    replaces: bool
    edited: str | None
    edited_config: Config | None
    access: Access
    token: str | None


class Configuration:
    """``env`` is what tokens are looked for in."""

    def __init__(self, source: ConfigSource, env: Mapping[str, str], node: PoolManager, server: ApiServer, logs: Logging) -> None:
        self.source = source
        self._env, self._node, self._server, self._logs = env, node, server, logs
        self._applied_text: str | None = None

    def started(self, text: str, config: Config) -> None:
        """The daemon has begun with this; it is the first of its history, unless that ends with it."""
        self._applied_text = text
        self._node.applied.note(text, config, self.source.path, "start", f"{len(config.pools)} pools at the start")

    def history(self) -> list[dict[str, Any]]:
        """The configurations that were applied, oldest first."""
        return self._node.applied.rows()

    async def plan(self, *, text: str | None = None, number: int | None = None, prune: bool = False) -> dict[str, Any]:
        """What applying the file would do; with ``text`` or a ``number`` of the history, what that would. Raises PoolError."""
        wanted = await asyncio.to_thread(self._wanted, text, number)
        plan = await self._node.plan_apply(wanted.config, prune=prune)
        would_change = plan["would_change"] or wanted.replaces
        no_effect = list(not_in_force(wanted.config))
        mine = {
            "file": str(self.source.path), "replaces_file": wanted.replaces, "edits": _edits(wanted), "without_effect": no_effect,
        }  # fmt: skip
        return {**mine, **plan, "digest": plan["digest"] + _mark(wanted), "would_change": would_change}

    async def apply(
        self, *, text: str | None = None, number: int | None = None, prune: bool = False, expect: str | None = None,
        origin: str = "apply",
    ) -> Operation:  # fmt: skip
        """Do it. ``expect`` is the digest of the plan that was agreed to. Raises PoolError, and nothing has changed then."""
        try:
            wanted = await asyncio.to_thread(self._wanted, text, number)
        except PoolError:
            self._node.events.emit("apply", "A configuration cannot be used", journal=False, outcome="refused")
            raise

        async def first(plan: Plan) -> None:
            await self._written(wanted, origin, summary(plan), gone_too=number is not None)

        options = ApplyOptions(prune, expect, first, self._node.applied.ended, _mark(wanted))
        operation = await self._node.apply(wanted.config, options)
        self._take_over(wanted)
        return operation

    async def _written(self, wanted: _Wanted, origin: str, what: str, *, gone_too: bool) -> None:
        """In the history and in the file, or in neither: it is what is applied from now on."""
        applied, path, numbers = self._node.applied, self.source.path, []
        try:
            if wanted.edited is not None and wanted.edited_config is not None:
                told, by = "edits of the file, then replaced", "edit"
                numbers.append(
                    await applied.keep(wanted.edited, wanted.edited_config, path, by, told, result=NOT_APPLIED)
                )  # fmt: skip
            numbers.append(await applied.keep(wanted.text, wanted.config, path, origin, what))
            if wanted.replaces:
                await asyncio.to_thread(self.source.replace, wanted.text, gone_too=gone_too)
        except PoolError:
            for number in reversed(numbers):
                applied.forget(number)
            raise
        applied.begun()
        self._applied_text = wanted.text

    def _wanted(self, text: str | None, number: int | None) -> _Wanted:
        """Read and checked as at a start. Blocks."""
        present: str | None = None
        try:
            present = self.source.text()
        except PoolError as problem:
            if text is None and number is None:
                if self.source.seen() is None:
                    problem.hint = "pool-managerd config rollback N brings one of the history back: pool-managerd config history"
                raise
        if number is not None:
            text = self._node.applied.text(number, self._secrets_from(present), self.source.path)
        chosen = text if text is not None else present or ""
        config = self.source.load(chosen)
        access, token = resolve_access(config, self._env)
        Metrics(config.telemetry.labels)
        access = with_local_token(access, self._node.config.daemon.state_dir)
        edited, says = self._edited(chosen, present)
        return _Wanted(chosen, config, chosen != present, edited, says, access, None if token is None else token.value)

    def _edited(self, chosen: str, present: str | None) -> tuple[str | None, Config | None]:
        """What ``chosen`` would overwrite that was never applied: empty for what cannot be read."""
        if present is None:
            return ("" if self.source.seen() is not None else None), None
        if present in (chosen, self._applied_text):
            return None, None
        try:
            says = self.source.load(present)
            return present, says if taken_out(present, says, self.source.path) is not None else None
        except PoolError:
            return present, None

    def _secrets_from(self, present: str | None) -> Config:
        """What the file says now, where it can be used; else what is in force."""
        try:
            return self._node.config if present is None else self.source.load(present)
        except PoolError:
            return self._node.config

    def _take_over(self, wanted: _Wanted) -> None:
        """The token and the log's level: no pool goes by them."""
        if wanted.token is not None:
            redactor = self._node.events.redactor
            redactor.know("auth", [*redactor.known("auth", 8), wanted.token])
        self._use(wanted.access)
        self._logs.use_level(wanted.config.telemetry.log_level)

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


def _edits(wanted: _Wanted) -> str | None:
    """What becomes of edits of the file that were not applied."""
    return None if wanted.edited is None else "kept" if wanted.edited_config is not None else "lost"


def _mark(wanted: _Wanted) -> str:
    """Of the edits that would be overwritten, none where there are none: who agrees to that has seen those and no others."""
    return "" if wanted.edited is None else "-" + hashlib.sha256(wanted.edited.encode()).hexdigest()[:16]
