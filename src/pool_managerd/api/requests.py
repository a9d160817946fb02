"""Reading a request: path ids, query switches, JSON bodies. Everything from outside is checked here, once."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Literal, TypeVar

from aiohttp import hdrs, web
from pydantic import BaseModel, ValidationError

from pool_managerd.api import strict_json
from pool_managerd.config import is_pool_id
from pool_managerd.errors import RequestError

BODY_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 1024 * 1024
MAX_KEYS = 64
_MODEL = TypeVar("_MODEL", bound=BaseModel)
_TOKEN_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")
DEVICE_PATTERN = r"^((GPU)?[0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z/-]{1,80})$"
_DEVICE = re.compile(r"(?:GPU)?(?P<index>[0-9]{1,4})|(?:GPU|MIG)-[0-9A-Za-z/-]{1,80}", re.ASCII | re.IGNORECASE)
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


def pool_id(request: web.Request) -> str:
    """The pool id of the path. What cannot be one is answered like any unknown pool: 404."""
    return possible_pool_id(request.match_info["pool_id"])


def possible_pool_id(given: str) -> str:
    """``given``, which may name a pool. Raises RequestError 404 for what cannot."""
    if is_pool_id(given):
        return given
    raise RequestError(f"pool {_safe(given)} not found", code="POOL_NOT_FOUND", status=404)


def new_pool_id(request: web.Request) -> str:
    """The pool id of a path that may create the pool: what cannot be one is a bad request."""
    given = request.match_info["pool_id"]
    if is_pool_id(given):
        return given
    raise RequestError(
        f"cannot use {_safe(given)} as a pool id",
        code="INVALID_PARAMS",
        hint="1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit, without '..'",
    )


def token_id(request: web.Request, what: Literal["lease", "operation", "ticket"]) -> str:
    """An id that the node has given; anything else was never given: 404."""
    given = request.match_info[f"{what}_id"]
    if _TOKEN_ID.match(given):
        return given
    raise RequestError(f"{what} {_safe(given)} not found", code=f"{what.upper()}_NOT_FOUND", status=404)


def device_id(request: web.Request) -> str:
    """The device of the path: an index (``GPU1`` is ``1``), or the UUID of a GPU or MIG instance. Anything else: 404."""
    given = request.match_info["device"]
    if found := _DEVICE.fullmatch(given):
        return given if found["index"] is None else str(int(found["index"]))
    raise RequestError(
        f"device {_safe(given)} not found",
        code="DEVICE_NOT_FOUND",
        status=404,
        hint="name it by its index or its UUID; `pool-managerd devices` lists them",
    )


def switch(request: web.Request, name: str, default: bool) -> bool:
    """A true/false query parameter. Raises RequestError 400 for anything else."""
    given = request.query.get(name)
    if given is None:
        return default
    value = _SWITCH.get(given.lower())
    if value is None:
        raise RequestError(f"cannot use {name}={_safe(given)}: write true or false")
    return value


def number(request: web.Request, name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number in the query, within its bounds. Raises RequestError 400 for anything else."""
    given = request.query.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) <= 19 and low <= int(given) <= high):
        raise RequestError(f"cannot use {name}={_safe(given)}: it must be a whole number from {low} to {high}")
    return int(given)


async def read_object(request: web.Request) -> dict[str, Any] | None:
    """The JSON object in the body; None when there is no body. Raises RequestError 400, 408, 413 or 415."""
    if not request.body_exists:
        return None
    if hdrs.CONTENT_ENCODING in request.headers:
        raise RequestError("cannot read a compressed request body", code="UNSUPPORTED_MEDIA_TYPE", status=415)
    if request.content_type != "application/json":
        # A web page can send text/plain anywhere without asking; it cannot send this type.
        raise RequestError(
            "cannot read the request body: its Content-Type must be application/json", code="UNSUPPORTED_MEDIA_TYPE", status=415
        )
    if (request.content_length or 0) > MAX_BODY_BYTES:  # said before it is sent: nobody waits for it
        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, request.content_length or 0)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.read()
    except TimeoutError:
        message = f"cannot wait longer than {BODY_TIMEOUT_S:.0f} s for the request body"
        raise RequestError(message, code="REQUEST_TIMEOUT", status=408) from None
    if not raw.strip():
        return None
    value = strict_json.parse(raw)
    if not isinstance(value, dict):
        raise RequestError("cannot use the request body: it must be a JSON object")
    return value


async def read_model(request: web.Request, model: type[_MODEL]) -> _MODEL:
    """The body checked against ``model``; an absent body stands for ``{}``. Raises RequestError 400 naming each key."""
    return checked(await read_object(request) or {}, model)


def checked(value: dict[str, Any], model: type[_MODEL]) -> _MODEL:
    """``value`` as a ``model``. Raises RequestError 400 that names the first few keys that are wrong."""
    if len(value) > MAX_KEYS:  # each would become an error of its own
        raise RequestError(f"cannot use the request body: it has {len(value)} keys, more than {MAX_KEYS}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors(include_input=False)[:8]
        )
        raise RequestError(f"cannot use the request body: {_safe(problems, 512)}") from None


def _safe(text: str, limit: int = 64) -> str:
    """``text`` as it may stand in an answer or a log line: printable ASCII, and not long."""
    clean = "".join(c if " " <= c <= "~" else "?" for c in text[:limit])
    return clean + "..." if len(text) > limit else clean
