"""A pool that is being written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.command_line import FlagOfKey, ReadFlags

ORDER = (
    "id", "engine", "model", "ctx", "slots", "devices", "tensor_split", "preload", "served_name", "aliases", "card", "requests",
    "idle_ttl_ms", "eviction_weight", "health_path", "provisioning",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What only the machine and the engines know: where a program lies (None: nowhere), what flags mean, and what keys do."""

    find: Callable[[str], str | None]
    flags: ReadFlags
    keyed: FlagOfKey


@dataclass(slots=True)
class Draft:
    """``model`` is its name in the other tool, ``notes`` are comments by its own keys; ``external``: somebody else starts its
    engine.
    """

    model: str
    pool_id: str
    fields: dict[str, Any] = field(default_factory=dict)
    notes: dict[KeyPath, list[str]] = field(default_factory=dict)
    external: bool = False

    def ordered(self) -> dict[str, Any]:
        return {key: self.fields[key] for key in ORDER if key in self.fields}
