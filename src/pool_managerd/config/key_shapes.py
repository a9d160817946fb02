"""What the schema says about one key path: the keys it may have, and whether it takes text. Read from the JSON Schema."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pool_managerd.config import json_schema


@cache
def _schema() -> dict[str, Any]:
    return json_schema()


@dataclass(frozen=True, slots=True)
class Shape:
    """The part of the schema that a key path leads to; ``nodes`` are its alternatives with references followed."""

    nodes: tuple[dict[str, Any], ...]

    @classmethod
    def at(cls, path: tuple[str | int, ...]) -> Shape:
        """The shape under ``path``; an unknown path has no alternatives."""
        nodes = alternatives(_schema())
        for part in path:
            nodes = [found for node in nodes for found in _step(node, part)]
        return cls(tuple(nodes))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys a section may have, in the order of the schema."""
        return tuple(key for node in self.nodes for key in node.get("properties", {}))

    @property
    def is_free_map(self) -> bool:
        """True for a map whose keys the user invents, such as labels."""
        return any(isinstance(node.get("additionalProperties"), dict) for node in self.nodes)

    def takes(self, kind: str) -> bool:
        """Whether a value may be of the type ``kind``, as JSON Schema calls it, or a ``path``."""
        return any(kind in (node.get("type"), node.get("format")) for node in self.nodes)


def alternatives(node: dict[str, Any]) -> list[dict[str, Any]]:
    """What may stand where ``node`` says, references followed."""
    if "$ref" in node:
        return alternatives(_schema()["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return [found for part in node["anyOf"] for found in alternatives(part)]
    return [node]


def _step(node: dict[str, Any], part: str | int) -> list[dict[str, Any]]:
    if isinstance(part, int):
        return alternatives(node["items"]) if isinstance(node.get("items"), dict) else []
    if part in node.get("properties", {}):
        return alternatives(node["properties"][part])
    extra = node.get("additionalProperties")
    return alternatives(extra) if isinstance(extra, dict) else []
