"""What is changed in a request's body on its way, by the rules of its pool. Without rules it passes as it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pool_managerd.gateway import agent_lines
from pool_managerd.gateway.asked import Asked
from pool_managerd.gateway.directory import Place

_KINDS = ("strip", "default", "set", "by_name")
_PROTECTED = "model"
"""Nobody's rule changes what was asked for."""


def for_engine(asked: Asked, place: Place | None) -> bytes | None:
    """The body for the engine of ``place``: lines of agents left out (``agent_friendly``), rules applied in the order strip,
    default, set, by_name, and an engine that insists on its own name for the model asked by that. None: there is none.
    """
    names = () if place is None else place.engine_names or ()
    renames = bool(names) and asked.model not in names
    if renames and asked.named_at is not None:
        return asked.body[: asked.named_at.start] + names[0].encode() + asked.body[asked.named_at.stop :]
    if place is None or not asked.body or not asked.json:
        return asked.body or None
    if place.rules is None and not renames:
        return asked.body
    rules = place.rules or {}
    agent = bool(rules.get("agent_friendly")) and agent_lines.may_be_in(asked.body)
    changes = renames or any(rules.get(kind) for kind in _KINDS)
    if not (agent or changes):
        return asked.body
    value: dict[str, Any] = json.loads(asked.body)
    if agent:
        as_written, value = value, agent_lines.without(value)
        if not changes and value == as_written:
            return asked.body
    _apply(value, rules, asked.model)
    if renames:
        value["model"] = names[0]
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _apply(value: dict[str, Any], rules: Mapping[str, Any], name: str) -> None:
    for path in rules.get("strip") or ():
        _strip(value, path.split("."))
    for path, default in (rules.get("default") or {}).items():
        _put(value, path.split("."), default, keep=True)
    for path, forced in {**(rules.get("set") or {}), **((rules.get("by_name") or {}).get(name) or {})}.items():
        _put(value, path.split("."), forced)


def _strip(value: dict[str, Any], path: list[str]) -> None:
    *objects, key = path
    for name in objects:
        inner = value.get(name)
        if not isinstance(inner, dict):
            return
        value = inner
    if path != [_PROTECTED]:
        value.pop(key, None)


def _put(value: dict[str, Any], path: list[str], new: Any, *, keep: bool = False) -> None:
    """What stands in the way of an object is replaced by one, unless ``keep``: then what the client said stays."""
    *objects, key = path
    for name in objects:
        inner = value.get(name)
        if not isinstance(inner, dict):
            if keep and name in value:
                return
            inner = value[name] = {}
        value = inner
    if path != [_PROTECTED] and not (keep and key in value):
        value[key] = new
