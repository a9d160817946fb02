"""A file of another tool moved over, and looked at as our own tools do: it loads, it may be served, every key has a finding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pool_managerd import daemon
from pool_managerd.config import Config
from pool_managerd.config.load import load_text
from pool_managerd.config.parse import key_text, parse_yaml
from pool_managerd.moving import llama_swap, presets
from pool_managerd.moving.document import Moved
from pool_managerd.moving.draft import Surroundings
from pool_managerd.moving.presets_ini import read
from pool_managerd.moving.report import Finding
from pool_managerd.wiring.imported_flags import flag_of_key, read_flags

PROGRAMS = {"llama-server": "/usr/bin/llama-server", "vllm": "/opt/vllm/bin/vllm"}
SURROUNDINGS = Surroundings(PROGRAMS.get, read_flags, flag_of_key)


@dataclass(frozen=True)
class Result:
    text: str
    config: Config
    findings: tuple[Finding, ...]

    @property
    def values(self) -> dict[str, Any]:
        return parse_yaml(self.text, "").values

    @property
    def pool(self) -> dict[str, Any]:
        """The first pool as it is written, without what every pool has."""
        found = dict(self.values["pools"][0])
        for key in ("id", "engine", "model", "preload"):
            found.pop(key, None)
        provisioning = {key: value for key, value in found.pop("provisioning", {}).items() if key not in ("mode", "binary")}
        return found | ({"provisioning": provisioning} if provisioning else {})

    def of(self, key: str) -> list[str]:
        """What became of ``key``: ``outcome to: why``."""
        return [f"{one.outcome} {one.text}".strip() for one in self.findings if one.key == key]

    def dropped(self) -> list[str]:
        return [one.key for one in self.findings if one.outcome == "dropped"]


def move(text: str, env: dict[str, str] | None = None) -> Result:
    """A llama-swap file, as the command does it."""
    moved = llama_swap.convert(text, "swap.yaml", env or {}, SURROUNDINGS)
    _every_key_has_one(moved.findings, text)
    return _fit_for_use(moved)


def move_presets(text: str) -> Result:
    """A file of llama.cpp's presets, as the command does it."""
    moved = presets.convert(text, "presets.ini", SURROUNDINGS)
    found = read(text, "presets.ini")
    told = {(one.line, one.key.partition("] ")[2].split(" ")[0]) for one in moved.findings}
    for entry in (*found.everywhere, *(one for entries in found.sections.values() for one in entries)):
        line = found.source.line(entry.path)
        assert any(at == line and entry.key.startswith(key) for at, key in told), entry
    return _fit_for_use(moved)


def _fit_for_use(moved: Moved) -> Result:
    config = load_text(moved.text, Path("/srv/pool-managerd.yaml"), env={})
    daemon.check(config, {})
    assert moved.dropped == sum(one.outcome == "dropped" for one in moved.findings)
    return Result(moved.text, config, moved.findings)


def _every_key_has_one(findings: tuple[Finding, ...], text: str) -> None:
    """A finding for each key of the top, and for each of a model, or for what is around it."""
    keys = [one.key for one in findings]
    tree = parse_yaml(text, "")
    written = {key_text(path) for path in tree.places if path}
    twice = [key for key, times in Counter(keys).items() if times > 1 and key in written]
    assert twice == []
    for key in tree.values:
        assert any(one == key or one.startswith((f"{key}.", f"{key}[", f"{key} ")) for one in keys), key
    for name, model in tree.values.get("models", {}).items():
        at = "".join(char if char.isprintable() else "�" for char in f"models.{name}")
        told = {one.removeprefix(at).lstrip(".").split(" ")[0].split(".")[0].split("[")[0] for one in keys if one.startswith(at)}
        whole = any(one.key == at and one.outcome == "dropped" for one in findings)
        assert whole or told >= {key for key, value in model.items() if "]" not in key}, (name, told, model)


def model(cmd: str = "llama-server -m /m/a.gguf", **keys: Any) -> str:
    """A file with one model, ``a``, whose further ``keys`` are given as Python values."""
    import json

    return f"models:\n  a: {json.dumps({'cmd': cmd, **keys})}\n"
