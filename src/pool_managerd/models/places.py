"""Where other tools keep models on this machine, and how they lay them out there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Layout(StrEnum):
    """How models lie in a directory."""

    HUB = "hub"
    """``models--ORG--REPO/{refs,snapshots,blobs}``: the hub's own tools, and newer llama.cpp."""
    FOLDERS = "folders"
    """``ORG/REPO/FILE``: LM Studio, and whoever copies repositories."""
    FLAT = "flat"
    """``ORG_REPO_FILE``: older llama.cpp."""
    OLLAMA = "ollama"
    """``manifests/HOST/USER/NAME/TAG`` and ``blobs/sha256-…``."""


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of models that belongs to somebody else: it is read, and nothing in it is ever changed.

    ``tool`` is what it is called: the tool's name, or the directory as the configuration has it.
    """

    tool: str
    root: Path
    layouts: tuple[Layout, ...]


def places_of(names: Iterable[str], env: Mapping[str, str], home: Path) -> tuple[Place, ...]:
    """The places of ``names`` (config: ``models.elsewhere``), whether there is anything at them or not; each once.

    ``env`` and ``home`` are those of this process: a tool's directory is where its own variables say, else the usual one.
    """
    found: dict[tuple[Path, Layout], None] = {}
    places: list[Place] = []
    for place in (place for name in names for place in _named(name, env, home)):
        new = tuple(layout for layout in place.layouts if (place.root, layout) not in found)
        found.update(dict.fromkeys((place.root, layout) for layout in new))
        if new:
            places.append(Place(place.tool, place.root, new))
    return tuple(places)


def _named(name: str, env: Mapping[str, str], home: Path) -> Iterator[Place]:
    caches = _first(env, "XDG_CACHE_HOME") or home / ".cache"
    if name == "huggingface":
        hub = _first(env, "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
        yield Place(name, hub or (_first(env, "HF_HOME") or caches / "huggingface") / "hub", (Layout.HUB,))
    elif name == "lm-studio":
        for root in (home / ".lmstudio/models", home / ".cache/lm-studio/models"):
            yield Place(name, root, (Layout.FOLDERS,))
    elif name == "llama.cpp":
        yield Place(name, _first(env, "LLAMA_CACHE") or caches / "llama.cpp", (Layout.FLAT, Layout.HUB))
    elif name == "ollama":
        own = _first(env, "OLLAMA_MODELS")
        for root in (own,) if own else (home / ".ollama/models", Path("/usr/share/ollama/.ollama/models")):
            yield Place(name, root, (Layout.OLLAMA,))
    else:
        yield Place(name, Path(os.path.normpath(home / name[2:] if name.startswith("~/") else name)), tuple(Layout))


def _first(env: Mapping[str, str], *names: str) -> Path | None:
    """The first of these variables that is an absolute path: what a relative one was relative to, nobody knows here."""
    found = (env.get(name, "") for name in names)
    return next((Path(value) for value in found if value.startswith("/")), None)
