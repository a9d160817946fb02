"""Directories of models as other tools lay them out, made by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pool_managerd.models.places import Layout, Place

COMMIT = "ba5eba11" * 5
MODEL_LAYER = "application/vnd.ollama.image.model"


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def hub_cache(
    root: Path, files: Mapping[str, bytes], repository: str = "org/repo", commit: str = COMMIT, ref: str = "main"
) -> Place:
    """As the hub's own tools do: a link for each file, to a blob that is called by its sha256."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    for name, body in files.items():
        blob, link = folder / "blobs" / sha256(body), folder / "snapshots" / commit / name
        blob.write_bytes(body)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", sha256(body)))
    return Place("huggingface", root, (Layout.HUB,))


def folders(root: Path, files: Mapping[str, bytes], repository: str = "org/repo") -> Place:
    """As LM Studio does."""
    for name, body in files.items():
        path = root / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return Place("lm-studio", root, (Layout.FOLDERS,))


def flat(root: Path, files: Mapping[str, bytes], repository: str = "org/repo") -> Place:
    """As llama.cpp did, before it took over the hub's cache."""
    root.mkdir(exist_ok=True)
    org, repo = repository.split("/")
    (root / f"manifest={org}={repo}=latest.json").write_text("{}")
    for name, body in files.items():
        (root / f"{org}_{repo}_{name.replace('/', '_')}").write_bytes(body)
    return Place("llama.cpp", root, (Layout.FLAT, Layout.HUB))


def ollama(root: Path, body: bytes, name: str = "registry.ollama.ai/library/tiny/latest", *more: tuple[str, bytes]) -> Place:
    """As Ollama does; ``more`` layers by what their type ends in."""
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    (root / "blobs").mkdir(exist_ok=True)
    layers = []
    for kind, content in (("model", body), *more):
        (root / "blobs" / f"sha256-{sha256(content)}").write_bytes(content)
        layers.append(
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{sha256(content)}", "size": len(content)}
        )
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return Place("ollama", root, (Layout.OLLAMA,))
