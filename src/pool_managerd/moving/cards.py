"""How lists show a model: its name for people, and whatever else the file says of it."""

from __future__ import annotations

from typing import Any

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.filters import keys_of
from pool_managerd.moving.macros import holds_secret
from pool_managerd.moving.report import Findings
from pool_managerd.moving.source import Source

_LONGEST = {"name": 256, "description": 4096}
_MAX_KEY_CHARS = 128


def card(source: Source, model: str, findings: Findings) -> dict[str, Any]:
    """The pool's ``card``; empty where there is nothing to show."""
    path: KeyPath = ("models", model)
    found: dict[str, Any] = {}
    for key, longest in _LONGEST.items():
        text = source.text((*path, key))
        if not text:
            findings.usual((*path, key), "it says nothing")
        elif holds_secret(text) or len(text) > longest:
            findings.dropped((*path, key), f"it holds a secret, or more than {longest} characters")
        else:
            found[key] = text
            findings.mapped((*path, key), f"pools[].card.{key}")
    if metadata := _metadata(source, path, findings):
        found["metadata"] = metadata
    if source.truth((*path, "unlisted"), False):
        found["listed"] = False
        findings.mapped((*path, "unlisted"), "pools[].card.listed")
    else:
        findings.usual((*path, "unlisted"), "it says nothing")
    return found


def _metadata(source: Source, path: KeyPath, findings: Findings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in source.mapping((*path, "metadata")).items():
        if not _usable(key, value):
            findings.dropped((*path, "metadata", key), "it holds a secret, or keys that are not 1 to 128 printable characters")
        else:
            found[key] = value
    findings.opened((*path, "metadata"))
    if found:
        findings.mapped((*path, "metadata"), "pools[].card.metadata")
    else:
        findings.usual((*path, "metadata"), "it says nothing")
    capabilities = source.mapping((*path, "capabilities"))
    if not capabilities:
        findings.usual((*path, "capabilities"), "it says nothing")
    elif "capabilities" in found or not _usable("capabilities", capabilities):
        findings.dropped((*path, "capabilities"), "the metadata has that key, or it holds what cannot be written here")
    else:
        found["capabilities"] = capabilities
        findings.kept((*path, "capabilities"), "pools[].card.metadata.capabilities")
    return found


def _usable(key: str, value: object) -> bool:
    if holds_secret([key, value]):
        return False
    return all(1 <= len(one) <= _MAX_KEY_CHARS and one.isprintable() for one in (key, *keys_of(value)))
