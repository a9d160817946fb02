"""Models that are kept as artifacts in a container registry: the layers of one, by its manifest (OCI distribution specification).

A layer is a file, or an archive of files: as Docker packages models, as CNCF ModelPack does, as `oras push` does, or an image.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import posixpath
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
_IMAGE = re.compile(
    r"application/vnd\.(?:oci\.image\.layer(?:\.nondistributable)?\.v1|docker\.image\.rootfs(?:\.foreign)?\.diff)\.tar\b.*"
)
_ARCHIVE = re.compile(r".*\.(?:tar|tgz)(?:[.+](?:gzip|zstd|archive))?")
_ORAS_UNPACK = "io.deis.oras.content.unpack"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
"""What registries call kinds of machines that the kernel calls otherwise."""
_NAMES = ("org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title")
_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
"""Where a registry is that is called otherwise."""


@dataclass(frozen=True, slots=True)
class Layer:
    """``path`` is where it lies among the files of its artifact, and never leads out of them; empty where nobody says it.
    ``kind`` is its media type. ``is_packed``: it is an archive of files.
    """

    digest: str
    size: int
    kind: str
    path: str
    is_packed: bool = False

    @property
    def name(self) -> str:
        """The file's own, whatever directories it was packaged from."""
        return self.path.rpartition("/")[2][:255]

    @property
    def is_of_image(self) -> bool:
        """A layer of a root file system."""
        return self.is_packed and not self.path and _IMAGE.fullmatch(self.kind) is not None

    @property
    def is_gguf(self) -> bool:
        """A model, and not what projects images into one."""
        if self.is_packed:
            return False
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
    """The digest of the one manifest that an index leads to, for machines such as this one; None: it is no index."""
    listed = manifest.get("manifests")
    if not isinstance(listed, list):
        return None
    known = [one for one in listed[:MAX_LAYERS] if isinstance(one, dict)]
    models = [one for one in known if not _is_attestation(one)]
    fitting = [one for one in models if _platform(one) == ("linux", _MACHINES.get(platform.machine(), platform.machine()))]
    digest = (models if len(models) == 1 else fitting[:1] or [{}])[0].get("digest")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        have = ", ".join(sorted({"/".join(_platform(one)) for one in models if all(_platform(one))})[:20])
        raise SpecError(
            f"cannot fetch {model.id}: it stands for {len(models)} artifacts{have and f', for {have}'}",
            status=422,
            hint="name one by its digest: …@sha256:HEX",
        )
    return digest


def _is_attestation(told: Mapping[str, Any]) -> bool:
    """What build tools put beside an image to say how it was made."""
    annotations = told.get("annotations")
    return isinstance(annotations, dict) and annotations.get("vnd.docker.reference.type") == "attestation-manifest"


def _platform(told: Mapping[str, Any]) -> tuple[str, str]:
    said = told.get("platform")
    said = said if isinstance(said, dict) else {}
    return str(said.get("os", "")), str(said.get("architecture", ""))


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
    kind = kind.partition(";")[0].strip().lower() if isinstance(kind, str) else ""
    annotations = told.get("annotations")
    said = annotations if isinstance(annotations, dict) else {}
    path = confined(next((said[key] for key in _NAMES if isinstance(said.get(key), str)), ""))
    # oras gives plain files the media type of an image's layer, and their names; it says where one is a folder
    is_file = bool(path) and _IMAGE.fullmatch(kind) is not None and said.get(_ORAS_UNPACK) != "true"
    return Layer(digest, size, kind, path, _ARCHIVE.fullmatch(kind) is not None and not is_file)


def confined(path: str) -> str:
    """``path`` as one that leads out of nowhere: packagers write where they found a file, be that /home/me or ../../."""
    parts = posixpath.normpath(path).split("/") if path else []
    kept = [part for part in parts if part not in ("", ".")]
    while kept and kept[0] == "..":
        del kept[0]
    return "/".join(kept)


def gguf_layers(artifact: Artifact) -> Sequence[Layer]:
    """Those that are a GGUF model by themselves, in their order."""
    return sorted((layer for layer in artifact.layers if layer.is_gguf), key=lambda layer: layer.name)  # else as they are


def _odd(model: ModelRef, why: str) -> NodeError:
    return NodeError(f"cannot fetch {model.id}: {why}", hint="see whether there is a registry at that address")
