"""The list of models, loaded or not, as clients of both APIs read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from pool_managerd.gateway.directory import Place

_STARTED = 1_700_000_000
"""``created`` of a model: clients want a number, and nobody knows one."""


AS_ROUTER: Mapping[str, Any] = MappingProxyType({
    "role": "router", "model_alias": "pool-managerd", "model_path": "none", "total_slots": 0,
    "default_generation_settings": {"params": {}, "n_ctx": 0},
})  # fmt: skip
"""``/props`` of no model, as llama.cpp's router answers it."""


def listed(places: Iterable[Place]) -> list[dict[str, Any]]:
    """One row per name that models are listed as; several pools may stand behind it, of which the first tells of itself."""
    named: dict[str, list[Place]] = {}
    for place in places:
        named.setdefault(place.name, []).append(place)
    return [_row(name, behind) for name, behind in sorted(named.items())]


def _row(name: str, places: list[Place]) -> dict[str, Any]:
    first = places[0]
    aliases = sorted({other for place in places for other in place.names} - {name})
    card, told = first.card, {key: text for key in ("name", "description") if (text := first.card.get(key))}
    each = None if first.ctx is None else first.ctx // max(1, first.slots)
    return {
        "id": name, "object": "model", "created": _STARTED, "owned_by": "pool-managerd", "type": "model",
        "display_name": card.get("name") or name, **told,
        "created_at": "2023-11-14T22:13:20Z", "context_length": each, "status": {"value": _status(places)},
        "meta": {
            "aliases": aliases, "pools": [place.pool_id for place in places], "n_ctx": each,
            "engine": first.engine, "model": first.model_id, "metadata": card.get("metadata") or {},
        },
    }  # fmt: skip


def _status(places: list[Place]) -> str:
    """Of the best of them."""
    if any(place.open for place in places):
        return "loaded"
    if any(place.loading for place in places):
        return "loading"
    return "stopped" if all(place.stays_down for place in places) else "unloaded"


def as_list(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For OpenAI's clients, Anthropic's (which look at ``has_more``) and Codex (which looks for ``models``)."""
    ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {"first_id": None, "last_id": None}
    return {"object": "list", "data": rows, "models": rows, "has_more": False, **ends}
