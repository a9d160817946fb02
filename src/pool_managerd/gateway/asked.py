"""Which model a request asks for, and whether it wants a stream: read from its body, which is forwarded as it came."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pool_managerd.errors import RequestError
from pool_managerd.gateway.paths import POSTS

MAX_MODEL_CHARS = 256
MAX_COMMAS = 1_000_000
"""Of a JSON body, which is read in one go: a million numbers take a tenth of a second, in which no other stream goes on."""
_MAX_PARTS = 64
_PART_NAME = re.compile(rb'form-data;[^\r\n]*?\bname="?([A-Za-z0-9_]+)"?[^\r\n]*\r\n', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Asked:
    """``model`` as the client calls it; ``body`` for the engine. ``named_at``: where a form has the model's name. ``session``:
    what the body says for requests with one beginning (OpenAI's ``prompt_cache_key``).
    """

    model: str
    stream: bool
    body: bytes
    json: bool = False
    named_at: slice | None = None
    session: str | None = None


def in_json(raw: bytes) -> Asked:
    """Raises RequestError 400 for a body that is no JSON object, or names no model; 413 for one of too many values."""
    if raw.count(b",") > MAX_COMMAS:
        raise RequestError(f"cannot take a request of more than {MAX_COMMAS:,} values", code="BODY_TOO_LARGE", status=413)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        why = "it is empty" if not raw.strip() else _place(problem)
        raise RequestError(f"cannot read the request body: it must be a JSON object, and {why}") from None
    if not isinstance(value, dict):
        raise RequestError("cannot use the request body: it must be a JSON object")
    session = value.get("prompt_cache_key")
    return Asked(
        _model(value.get("model")), value.get("stream") is True, raw, json=True,
        session=session if isinstance(session, str) else None,
    )  # fmt: skip


def passed_through(model: str, raw: bytes, target: str) -> Asked:
    """Of a request that is passed on as it is, unless its path is one of those that are served under other names, too, with a
    body that rules can be applied to.
    """
    known = target.partition("?")[0] in POSTS and len(raw) > 1 and raw.count(b",") <= MAX_COMMAS
    try:
        is_object = known and isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        is_object = False
    return Asked(model, stream=False, body=raw, json=is_object)


def in_form(raw: bytes, content_type: str) -> Asked:
    """As ``in_json``, of a multipart form."""
    found = re.search(r'boundary="?([^";]{1,200})"?', content_type)
    if found is None:
        raise RequestError("cannot read the form: its Content-Type names no boundary")
    places: dict[str, slice] = {}
    for head, content in _parts(raw, b"--" + found[1].encode()):
        if content.stop - content.start <= 4 * MAX_MODEL_CHARS and (name := _PART_NAME.search(raw[head])) is not None:
            if name[1] == b"model" and "model" in places:
                raise RequestError("cannot tell which model is asked for: the form names one twice")
            places[name[1].decode()] = content
    fields = {name: raw[place].strip().decode("utf-8", "replace") for name, place in places.items()}
    stream = fields.get("stream", "").lower() == "true"
    return Asked(_model(fields.get("model")), stream, raw, named_at=places.get("model"))


def _parts(raw: bytes, border: bytes) -> Iterator[tuple[slice, slice]]:
    """Where the head and the content of each part are."""
    begin = raw.find(border)
    for _ in range(_MAX_PARTS):
        end = raw.find(border, begin + len(border))
        if begin < 0 or end < 0:
            return
        if (blank := raw.find(b"\r\n\r\n", begin, end)) >= 0:
            yield slice(begin, blank + 2), slice(blank + 4, max(blank + 4, end - 2))
        begin = end


def _model(value: object) -> str:
    if value is None:
        raise RequestError("cannot tell which model is asked for: the request has no `model`", hint="GET /v1/models lists them")
    if not isinstance(value, str) or not 0 < len(value) <= MAX_MODEL_CHARS or not value.isprintable():
        raise RequestError("cannot use `model`: it must be the name of a model", hint="GET /v1/models lists them")
    return value


def _place(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"line {problem.lineno}, column {problem.colno} is not: {problem.msg[:60].lower()}"
    if isinstance(problem, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is nested too deeply" if isinstance(problem, RecursionError) else "it has a number of too many digits"
