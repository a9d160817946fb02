"""``filters`` of a model as rules for requests."""

from __future__ import annotations

from typing import Any

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.macros import holds_secret
from pool_managerd.moving.names import usable
from pool_managerd.moving.report import Findings
from pool_managerd.moving.source import Source

_PROTECTED = "model"
_MAX_KEY_CHARS = 128


def rules(source: Source, model: str, findings: Findings) -> dict[str, Any]:
    """The pool's ``requests``, with what its streams tell while they wait; empty where there are no rules."""
    path: KeyPath = ("models", model, "filters")
    found: dict[str, Any] = {}
    given = source.mapping(path)
    findings.opened(path)
    if path[2] in source.mapping(path[:2]) and not given:
        findings.needless(path, "it is empty")
    for key in ("stripParams", "strip_params"):
        if key in given:
            _strip(source, (*path, key), found, findings)
    for key, name in (("setParams", "set"), ("setParamsByID", "by_name")):
        if key not in given:
            continue
        values = source.mapping((*path, key))
        to = f"pools[].requests.{name}"
        if not values:
            findings.needless((*path, key), "it is empty")
        elif name == "set":
            if moved := _params(values, (*path, key), to, findings):
                found[name] = moved
        else:
            _by_name(source, (*path, key), found, findings)
    told: KeyPath = ("models", model, "sendLoadingState")
    if source.get(told) is not None:
        found["loading_text"] = source.truth(told, False)
        findings.mapped(told, "pools[].requests.loading_text")
    findings.usual(told, "it says nothing")
    return found


def _strip(source: Source, path: KeyPath, found: dict[str, Any], findings: Findings) -> None:
    names = dict.fromkeys(part.strip() for part in source.text(path).split(","))
    good = [name for name in names if name and name != _PROTECTED and _bad(name, None) is None]
    bad = [name for name in names if name and name != _PROTECTED and _bad(name, None) is not None]
    if bad or not good:
        why = f"cannot name such keys here: {', '.join(bad)[:80]!r}" if bad else ""
        (findings.dropped if bad else findings.needless)(path, why or "it takes nothing out", part="" if not good else "(some)")
    if good:
        found["strip"] = list(dict.fromkeys([*found.get("strip", []), *good]))
        findings.mapped(path, "pools[].requests.strip")


def _by_name(source: Source, path: KeyPath, found: dict[str, Any], findings: Findings) -> None:
    moved: dict[str, Any] = {}
    for name in source.mapping(path):
        if not usable(name) or holds_secret(name):
            findings.dropped(path, "a name has 1 to 256 printable characters here", part=f"{name[:40]!r}")
            continue
        moved[name] = _params(source.mapping((*path, name)), (*path, name), "pools[].requests.by_name", findings)
    if moved:
        found["by_name"] = moved


def _params(values: dict[str, Any], path: KeyPath, to: str, findings: Findings) -> dict[str, Any]:
    """Those that can be set here, with one finding for all of them, and one for each that cannot."""
    moved: dict[str, Any] = {}
    for key, value in values.items():
        if key == _PROTECTED:
            findings.needless((*path, key), "llama-swap never sets `model` either")
        elif (why := _bad(key, value)) is not None:
            findings.dropped((*path, key), why)
        else:
            moved[key] = value
    if moved or not values:
        findings.mapped(path, to)
    return moved


def _bad(key: str, value: object) -> str | None:
    """Why a key cannot be set here."""
    if holds_secret([key, value]):
        return "it holds a secret of the environment, which is not written into a file"
    if not 1 <= len(key) <= _MAX_KEY_CHARS or any(not text.isprintable() or len(text) > 900 for text in keys_of(value)):
        return f"keys have 1 to {_MAX_KEY_CHARS} printable characters here"
    if (
        not key.isprintable()
        or set(key) & set("\\*?|#@:")
        or any(part in ("", "-1") or part.isdigit() for part in key.split("."))
    ):
        return "a dot reaches into an object here, and nothing into a list: set the whole list"
    return None


def keys_of(value: object) -> list[str]:
    """Every key in ``value``, however deep."""
    if isinstance(value, dict):
        return [*value, *(key for part in value.values() for key in keys_of(part))]
    return [key for part in value for key in keys_of(part)] if isinstance(value, list) else []
