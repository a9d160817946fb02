"""Errors by who must act: the author of the configuration, the node's operator, the engine, or the caller.

Every error carries a stable ``code`` (SPEC §11.2), the HTTP status it maps to, an optional ``hint`` that says
what to do, and whether trying again can help. Messages start with "cannot" unless a specification fixes the text.
"""

from __future__ import annotations

from typing import Any, ClassVar


class PoolError(Exception):
    """The root of everything this package raises on purpose.

    ``retry_after_ms`` is set only where waiting that long is known to help. ``details`` is extra data for
    machines; it must never hold a secret.
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        hint: str | None = None,
        retriable: bool | None = None,
        retry_after_ms: int | None = None,
        pool_id: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = code or self.code
        self.http_status = status or self.status
        self.hint = hint
        self.is_retriable = self.retriable if retriable is None else retriable
        self.retry_after_ms = retry_after_ms
        self.pool_id = pool_id
        self.details = details or {}


class SpecError(PoolError):
    """What was asked for is wrong: configuration, model reference, device mask, engine flags."""

    code = "INVALID_PARAMS"
    status = 400


class NodeError(PoolError):
    """This machine cannot do it now: no GPU, no memory, no disk, a locked state directory."""

    code = "NODE_UNAVAILABLE"
    status = 503
    retriable = True


class EngineError(PoolError):
    """The engine failed: it could not be run, exited, or never became healthy."""

    code = "PRELOAD_FAILED"
    status = 500


class RequestError(PoolError):
    """The caller's request cannot be served in the present state (unknown pool, draining, no slots …)."""

    code = "INVALID_PARAMS"
    status = 400
