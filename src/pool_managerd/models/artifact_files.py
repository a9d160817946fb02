"""Which of the layers of an artifact are fetched, and which of the files in them an engine needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import SpecError
from pool_managerd.models.hub import HubFile, HubListing
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.registry import Artifact, Layer
from pool_managerd.models.repository import CONFIG, needed_files

MAX_DEPTH = 32
_SAFETENSORS = frozenset({"application/vnd.docker.ai.safetensors", "application/vnd.cncf.model.weight.v1.safetensors"})
_TEMPLATE = "application/vnd.docker.ai.chat.template.jinja"
_NOT_NEEDED = re.compile(r".*\.(?:licen[cs]e|docs?|datasets?|mmproj)\b.*")
_CODE = re.compile(r".*\.code\b.*")
_WEIGHTS = re.compile(r".+\.(?:safetensors|bin|pt|pth)", re.IGNORECASE)
_SHOWN = 20


def needed_layers(artifact: Artifact, model: ModelRef, policy: PolicyConfig) -> list[Layer]:
    """Files with their paths, and archives of which nobody knows what is in them; in their order. Raises SpecError."""
    found = [layer for layer in _with_names(artifact.layers) if _is_needed(layer, policy)]
    latest = {(layer.digest, layer.path): number for number, layer in enumerate(found)}  # what comes twice counts once
    layers = [layer for number, layer in enumerate(found) if latest[layer.digest, layer.path] == number]
    for layer in layers:
        if layer.is_packed and "zstd" in layer.kind:
            raise zstd_refused(model, layer.kind)
    files = [layer.path for layer in layers if not layer.is_packed]
    if twice := sorted({path for path in files if files.count(path) > 1}):
        raise SpecError(f"cannot fetch {model.id}: it has several files called {', '.join(twice[:_SHOWN])}", status=422)
    if not any(layer.is_packed or _WEIGHTS.fullmatch(layer.path) for layer in layers):
        kinds = sorted({f"{layer.name or 'a layer'} ({layer.kind or 'of no kind'})" for layer in artifact.layers})
        raise SpecError(
            f"cannot fetch {model.id}: no layer of it is a model", status=422,
            hint=f"GGUF and safetensors are taken, by themselves and in archives and images; it has: {', '.join(kinds)[:400]}",
        )  # fmt: skip
    return layers


def needed_below(model: ModelRef, listing: HubListing, policy: PolicyConfig) -> tuple[str, list[HubFile], list[HubFile]]:
    """The folder that the model is in, which ends with a slash unless it is the uppermost; its weights, and what is beside
    them, with their paths below it. Raises SpecError.
    """
    folder = _folder(model, listing)
    below = tuple(replace(one, path=one.path.removeprefix(folder)) for one in listing.files if one.path.startswith(folder))
    weights, beside = needed_files(model, HubListing(listing.commit, below), policy)
    return folder, weights, beside


def is_plain(path: str) -> bool:
    """Whether a file can be called so that an engine needs: what is printable, and leads down from where it is."""
    parts = path.split("/")
    return (
        0 < len(path) <= 1024
        and path.isprintable()
        and "\\" not in path
        and len(parts) <= MAX_DEPTH
        and not any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    )


def zstd_refused(model: ModelRef, what: str) -> SpecError:
    return SpecError(
        f"cannot fetch {model.id}: {what} is compressed with zstd, which this version cannot read", status=422,
        hint="push it with gzip, or uncompressed",
    )  # fmt: skip


def _is_needed(layer: Layer, policy: PolicyConfig) -> bool:
    if _NOT_NEEDED.fullmatch(layer.kind) or (_CODE.fullmatch(layer.kind) and not policy.allow_remote_code):
        return False
    return layer.is_packed or is_plain(layer.path)


def _with_names(layers: Sequence[Layer]) -> list[Layer]:
    """Docker's first artifacts have no names in them: they are what everybody calls such files."""
    count, named = sum(layer.kind in _SAFETENSORS and not layer.path for layer in layers), list[Layer]()
    number = 0
    for layer in layers:
        path = layer.path
        if not path and layer.kind == _TEMPLATE:
            path = "chat_template.jinja"
        elif not path and layer.kind in _SAFETENSORS:
            number += 1
            path = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        named.append(replace(layer, path=path))
    return named


def _folder(model: ModelRef, listing: HubListing) -> str:
    """The uppermost with a configuration and weights; people package what is at home in some folder of theirs."""
    configured = {file.path.removesuffix(CONFIG) for file in listing.files if f"/{file.path}".endswith(f"/{CONFIG}")}
    weighty = {file.path.rpartition("/")[0] for file in listing.files if _WEIGHTS.fullmatch(file.path)}
    folders = {folder for folder in configured if folder.rstrip("/") in weighty} or configured
    depth = min((folder.count("/") for folder in folders), default=0)
    found = sorted(folder for folder in folders if folder.count("/") == depth)
    if len(found) > 1:
        have = ", ".join(folder.rstrip("/") for folder in found[:_SHOWN])
        raise SpecError(f"cannot fetch {model.id}: it has {len(found)} models: {have}", status=422)
    return found[0] if found else ""
