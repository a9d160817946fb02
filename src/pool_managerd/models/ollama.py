"""Models of Ollama: a manifest by name, whose layers are blobs called by their sha256. Only read; nothing is ever pulled."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pool_managerd.errors import SpecError
from pool_managerd.models.foreign_files import ForeignFile, foreign_file, read_small
from pool_managerd.models.refs import ModelRef, parse_ref

MAX_MANIFEST_BYTES = 1 << 20
MAX_MANIFESTS = 5_000
_LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """``notices`` say what of it no engine gets."""

    file: ForeignFile
    notices: tuple[str, ...] = ()


def ollama_model(root: Path, model: ModelRef) -> OllamaModel | None:
    """The model of an ``ollama:`` reference in ``root``; None where there is no manifest of that name.

    Blocks. Raises SpecError for a manifest that cannot be used.
    """
    manifest = root / "manifests" / model.location / model.revision
    try:
        layers = _layers(read_small(manifest, MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        raise _refused(model, f"{manifest} cannot be read: {problem.strerror or problem}") from problem
    if layers is None:
        raise _refused(model, f"{manifest} is no manifest of Ollama")
    weights = [digest for kind, digest in layers if kind == "model"]
    if any(kind == "adapter" for kind, _ in layers):
        raise _refused(
            model, "it has an adapter, without which it is another model", "merge the adapter into it, and import that"
        )
    if len(weights) != 1:
        why = (
            "it has no model of its own: it runs in Ollama's cloud, or is not one GGUF file" if not weights else "it is in parts"
        )
        raise _refused(model, why)
    blob = root / "blobs" / f"sha256-{weights[0]}"
    found = foreign_file(f"{model.location}:{model.revision}", blob, root, weights[0])
    if found is None:
        raise _refused(model, f"its blob {blob} is not there, or empty", f"ollama pull {model.id.removeprefix('ollama:')}")
    projector = any(kind == "projector" for kind, _ in layers)
    return OllamaModel(found, ("its projector, which reads images, is not used",) if projector else ())


def ollama_refs(root: Path) -> Iterator[str]:
    """References to all that ``root`` has a manifest of, sorted."""
    base = root / "manifests"
    found = list[str]()
    with suppress(OSError):
        for here, folders, names in os.walk(base, followlinks=False):
            folders.sort()
            parts = Path(here).relative_to(base).parts
            if len(parts) >= 3:
                folders.clear()
                found += [ref for name in names if (ref := _ref("/".join(parts), name)) is not None]
            if len(found) > MAX_MANIFESTS:
                break
    yield from sorted(found)[:MAX_MANIFESTS]


def _ref(location: str, tag: str) -> str | None:
    """None for a name that Ollama does not give."""
    try:
        return parse_ref(f"ollama:{location}:{tag}").id
    except SpecError:
        return None


def _layers(text: bytes) -> list[tuple[str, str]] | None:
    """(kind, sha256) of each."""
    try:
        told: Any = json.loads(text)
        layers = [(str(one["mediaType"]), _DIGEST.fullmatch(str(one["digest"]))) for one in told["layers"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if any(digest is None for _, digest in layers):
        return None
    return [(kind.removeprefix(_LAYER), digest[1]) for kind, digest in layers if digest is not None]


def _refused(model: ModelRef, why: str, hint: str | None = None) -> SpecError:
    return SpecError(f"cannot use {model.id}: {why}", hint=hint or "pool-managerd models ls --all shows what can be used")
