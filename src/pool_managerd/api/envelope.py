"""Responses: JSON, and the one shape every error has (SPEC §11.2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from pool_managerd.errors import PoolError

CORRELATION_KEY = web.RequestKey("correlation_id", str)
TRUSTED_KEY = web.RequestKey("trusted", bool)
"""False for a local user who may see ids and states only; absent: the caller has the token."""

OWNER_KEY = web.RequestKey("owner", bool)
"""True for the daemon's own user and root on this machine; only where the route asks."""

CORRELATION_HEADER = "X-Correlation-Id"
_encode = json.JSONEncoder(separators=(",", ":"), default=str, allow_nan=False).encode
_HTTP_REFUSALS = {
    404: ("NOT_FOUND", "cannot find this path"),
    405: ("METHOD_NOT_ALLOWED", "cannot use this method on this path"),
    413: ("BODY_TOO_LARGE", "cannot take a request body of more than 1 MiB"),
}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """``value`` as compact JSON."""
    body = _encode(value).encode("ascii")
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


class Handover(web.Response):
    """An answer that gives something away: it is taken back where the answer could not be written."""

    def __init__(self, value: Any, take_back: Callable[[], object]) -> None:
        super().__init__(body=_encode(value).encode("ascii"), status=201, content_type="application/json")
        self._take_back = take_back

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        with self._or_taken_back():
            return await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        with self._or_taken_back():
            await super().write_eof(data)

    @contextmanager
    def _or_taken_back(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._take_back()
            raise


def envelope(error: PoolError, correlation_id: str) -> dict[str, Any]:
    """The error as a caller sees it. ``error`` repeats ``message`` under the name that older callers read."""
    body: dict[str, Any] = {
        "code": error.code,
        "message": error.message,
        "error": error.message,
        "retriable": error.retriable,
        "correlation_id": correlation_id,
    }
    optional = {
        "hint": error.hint,
        "retry_after_ms": error.retry_after_ms,
        "pool_id": error.pool_id,
        "details": error.details or None,
    }
    body.update({key: value for key, value in optional.items() if value is not None})
    if isinstance(engine := error.details.get("engine"), str):
        body["engine"] = engine
    return body


def error_response(error: PoolError, correlation_id: str) -> web.Response:
    """The envelope with the error's status; 401 and the retriable ones carry the headers that go with them."""
    headers: dict[str, str] = {}
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(max(1, -(-error.retry_after_ms // 1000)))
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="pool-managerd"'
    return json_response(envelope(error, correlation_id), error.status, headers)


def from_http_exception(error: web.HTTPException, correlation_id: str) -> web.Response:
    """aiohttp's own refusals (unknown route, wrong method, body too large) in the same shape."""
    other = ("INVALID_PARAMS" if error.status < 500 else "INTERNAL", f"cannot serve the request: {error.reason}")
    code, message = _HTTP_REFUSALS.get(error.status, other)
    hint = "GET /openapi.json lists what is served" if error.status in (404, 405) else None
    failure = PoolError(message, code=code, status=error.status, hint=hint, retriable=False)
    response = error_response(failure, correlation_id)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response
