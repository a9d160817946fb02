"""Which model a request asks for, and whether it wants a stream: read from its body, which is forwarded as it came."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from pool_managerd.errors import RequestError

MAX_MODEL_CHARS = 256
_PART_NAME = re.compile(rb'form-data;[^\r\n]*?\bname="?([A-Za-z0-9_]+)"?[^\r\n]*\r\n', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Asked:
    """``model`` as the client calls it; ``body`` for the engine."""

    model: str
    stream: bool
    body: bytes
    json: bool = False


def in_json(raw: bytes) -> Asked:
    """Raises RequestError 400 for a body that is no JSON object, or names no model."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        why = "it is empty" if not raw.strip() else _place(problem)
        raise RequestError(f"cannot read the request body: it must be a JSON object, and {why}") from None
    if not isinstance(value, dict):
        raise RequestError("cannot use the request body: it must be a JSON object")
    return Asked(_model(value.get("model")), value.get("stream") is True, raw, json=True)


def in_form(raw: bytes, content_type: str) -> Asked:
    """As ``in_json``, of a multipart form."""
    found = re.search(r'boundary="?([^";]{1,200})"?', content_type)
    if found is None:
        raise RequestError("cannot read the form: its Content-Type names no boundary")
    fields: dict[str, str] = {}
    for part in raw.split(b"--" + found[1].encode())[:64]:
        head, _, content = part.partition(b"\r\n\r\n")
        if len(content) <= 4 * MAX_MODEL_CHARS and (name := _PART_NAME.search(head + b"\r\n")) is not None:
            fields[name[1].decode()] = content.strip().decode("utf-8", "replace")
    return Asked(_model(fields.get("model")), fields.get("stream", "").lower() == "true", raw)


def _model(value: object) -> str:
    if value is None:
        raise RequestError("cannot tell which model is asked for: the request has no `model`", hint="GET /v1/models lists them")
    if not isinstance(value, str) or not 0 < len(value) <= MAX_MODEL_CHARS or not value.isprintable():
        raise RequestError("cannot use `model`: it must be the name of a model", hint="GET /v1/models lists them")
    return value


def _place(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"line {problem.lineno}, column {problem.colno} is not: {problem.msg[:60].lower()}"
    return "it is not UTF-8" if isinstance(problem, UnicodeDecodeError) else "it is nested too deeply"
