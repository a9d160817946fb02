"""Models that are kept as artifacts in a container registry: the files of one, by its manifest (OCI distribution specification).

GGUF models are taken, each file a layer of its own: as Docker packages them, as CNCF ModelPack does, or under their names.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yarl import URL

from pool_managerd.errors import NodeError, SpecError
from pool_managerd.models.addresses import is_loopback
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.web import Web

MAX_MANIFEST_BYTES = 4 << 20
MAX_LAYERS = 1_000
_REF = re.compile(r"oci://(?P<host>[^/]+)/(?P<name>[^:@]+)(?::(?P<tag>[^@]+)|@(?P<digest>sha256:[0-9a-f]{64}))")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)  # fmt: skip
_GGUF = frozenset({
    "application/vnd.docker.ai.gguf.v3", "application/vnd.docker.ai.model.file.v1+gguf",
    "application/vnd.cncf.model.weight.v1.gguf",
})  # fmt: skip
_PROJECTOR = "application/vnd.docker.ai.mmproj"
_NAMES = ("org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title")
_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
"""Where a registry is that is called otherwise."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of an artifact; ``name`` is empty where nobody has given it one."""

    digest: str
    size: int
    kind: str
    name: str

    @property
    def is_gguf(self) -> bool:
        """A model, and not what projects images into one."""
        named = self.name.lower().endswith(".gguf")
        return (self.kind in _GGUF or named) and self.kind != _PROJECTOR and not self.name.lower().startswith("mmproj")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model as it is under ``digest``, whatever its tag is moved to. ``repository`` is the address that its blobs are below."""

    repository: URL
    digest: str
    layers: tuple[Layer, ...]


def repository_of(model: ModelRef, *, may_be_plain: bool) -> URL:
    """Its address in the registry's API. ``may_be_plain``: without encryption where that is this machine itself."""
    host, name, _ = _parts(model)
    name = f"library/{name}" if host in _HOSTS and "/" not in name else name
    authority = _HOSTS.get(host, host)
    url = URL(f"https://{authority}")
    plain = may_be_plain and is_loopback(url.host or "")
    return URL(f"{'http' if plain else 'https'}://{authority}/v2/{name}")


async def find_artifact(model: ModelRef, web: Web) -> Artifact:
    """Raises AgainError and PoolError."""
    repository, (_, _, wanted) = repository_of(model, may_be_plain=web.may_be_plain), _parts(model)
    web.registries.enter(repository)
    manifest, digest = await _manifest(repository, wanted, model, web)
    if (chosen := _of_index(manifest, model)) is not None:
        manifest, digest = await _manifest(repository, chosen, model, web)
    return Artifact(repository, digest, _layers(manifest, model))


def _parts(model: ModelRef) -> tuple[str, str, str]:
    """Host, name, and tag or digest."""
    found = _REF.fullmatch(model.location)
    if found is None:
        raise SpecError(f"cannot use {model.id} as a model: write it as oci://REGISTRY/REPO:TAG")
    return found["host"], found["name"], found["tag"] or found["digest"]


async def _manifest(repository: URL, wanted: str, model: ModelRef, web: Web) -> tuple[Mapping[str, Any], str]:
    """It, and its digest, which it is checked against where it was asked for by that."""
    body = await web.read(repository / "manifests" / wanted, {"Accept": ", ".join(_MANIFESTS)}, MAX_MANIFEST_BYTES)
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if wanted.startswith("sha256:") and digest != wanted:
        raise SpecError(
            f"cannot use {model.id}: digest mismatch: its manifest should be {wanted}, and is {digest}",
            code="DIGEST_MISMATCH", status=422, hint=f"see who answers at {repository.host}",
        )  # fmt: skip
    return await asyncio.to_thread(_read, body, model), digest


def _read(body: bytes, model: ModelRef) -> Mapping[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise _odd(model, "its manifest cannot be read")
    return told


def _of_index(manifest: Mapping[str, Any], model: ModelRef) -> str | None:
    """The digest of the one manifest that an index leads to; None: it is no index. Variants for machines are not for models."""
    listed = manifest.get("manifests")
    if not isinstance(listed, list):
        return None
    digests = [one.get("digest") for one in listed[:MAX_LAYERS] if isinstance(one, dict)]
    if len(digests) != 1 or not isinstance(digests[0], str) or not _DIGEST.fullmatch(digests[0]):
        raise SpecError(
            f"cannot fetch {model.id}: it stands for {len(digests)} artifacts",
            status=422,
            hint="name one by its digest: …@sha256:HEX",
        )
    return digests[0]


def _layers(manifest: Mapping[str, Any], model: ModelRef) -> tuple[Layer, ...]:
    listed = manifest.get("layers")
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_LAYERS:
        raise _odd(model, "its manifest has no layers")
    return tuple(_layer(one, model) for one in listed)


def _layer(told: Any, model: ModelRef) -> Layer:
    told = told if isinstance(told, dict) else {}
    digest, size, kind = told.get("digest"), told.get("size"), told.get("mediaType")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(size, int) or not 0 <= size < 1 << 50:
        raise _odd(model, "a layer of its manifest has no sha256, or no size")
    return Layer(digest, size, kind if isinstance(kind, str) else "", _name(told.get("annotations")))


def _name(annotations: Any) -> str:
    """The file's own, whatever directories it was packaged from."""
    said = annotations if isinstance(annotations, dict) else {}
    found = next((said[key] for key in _NAMES if isinstance(said.get(key), str)), "")
    return str(found).rpartition("/")[2][:255]


def gguf_layers(artifact: Artifact, model: ModelRef) -> Sequence[Layer]:
    """Those that are the model, in their order. Raises SpecError where there is none."""
    found = [layer for layer in artifact.layers if layer.is_gguf]
    if not found:
        kinds = sorted({layer.kind or "of no kind" for layer in artifact.layers})
        raise SpecError(
            f"cannot fetch {model.id}: no layer of it is a GGUF model", status=422,
            hint=f"this version takes no archives and no safetensors from registries; it has: {', '.join(kinds)[:400]}",
        )  # fmt: skip
    return sorted(found, key=lambda layer: layer.name)  # without names they stay as they are


def _odd(model: ModelRef, why: str) -> NodeError:
    return NodeError(f"cannot fetch {model.id}: {why}", hint="see whether there is a registry at that address")
