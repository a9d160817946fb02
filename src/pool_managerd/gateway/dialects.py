"""How each API tells an error, before an answer and in the middle of a stream, and shows a sign of life."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pool_managerd.errors import PoolError

STILL_HERE = b": still here\n\n"
"""A comment of server-sent events: every client skips it."""
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_OPENAI_CODES = {"MODEL_NOT_FOUND": "model_not_found", "QUEUE_FULL": "rate_limit_exceeded", "BODY_TOO_LARGE": "request_too_large"}


class Dialect(StrEnum):
    """Whose API a path is of."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Told:
    """An error as a client of its API expects it."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def told(error: PoolError, dialect: Dialect, request_id: str) -> Told:
    """``error`` as an answer. What trying again cannot help says so to the SDKs, which try several times otherwise."""
    headers = {"x-should-retry": "true" if error.retriable else "false"}
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(max(1, -(-error.retry_after_ms // 1000)))
    elif error.retriable:
        headers["Retry-After"] = "1"
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="pool-managerd"'
    return Told(error.status, _body(error, dialect, request_id), headers)


def told_in_stream(error: PoolError, dialect: Dialect, request_id: str) -> bytes:
    """``error`` as the last event of a stream that has begun."""
    data = json.dumps(_body(error, dialect, request_id), separators=(",", ":"))
    return f"event: error\ndata: {data}\n\n".encode() if dialect is Dialect.ANTHROPIC else f"data: {data}\n\n".encode()


def _body(error: PoolError, dialect: Dialect, request_id: str) -> dict[str, Any]:
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    kind = "invalid_request_error" if error.status < 500 and error.status != 429 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    code = _OPENAI_CODES.get(error.code, error.code.lower())
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
