"""What a reference to a model elsewhere stands for: the files to be fetched, before any of them is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from yarl import URL

from pool_managerd.errors import SpecError
from pool_managerd.models.buckets import BucketAccess
from pool_managerd.models.gguf_parts import MAX_PARTS
from pool_managerd.models.hub import HubFile, HubListing, list_repository
from pool_managerd.models.hub_access import HubAccess
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.registry import Artifact, find_artifact, gguf_layers
from pool_managerd.models.repository import needed_files
from pool_managerd.models.web import Web

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file at ``url``. ``name`` is its path below the folder of its model; ``size`` and ``sha256`` (hex) are None where they
    are not said beforehand. A file whose ``sha256`` is known is checked against it before anybody sees it; a small one against
    ``blob``, its name in git.
    """

    url: URL
    name: str
    size: int | None = None
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """The files of a model, those of a split one in their order. ``folder`` is where they lie in the cache; ``source`` says what
    they are a version of: the hub's commit. Of one that is a folder the first ``weights`` files are its weights.
    """

    ref: ModelRef
    folder: str
    files: tuple[RemoteFile, ...]
    source: str = ""
    weights: int = 0

    @property
    def is_folder(self) -> bool:
        return self.weights > 0

    @property
    def size_bytes(self) -> int | None:
        """None where it is not known beforehand."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)


async def find(model: ModelRef, web: Web, digests: Sequence[str]) -> RemoteModel:
    """What ``model`` stands for now; ``digests`` (``sha256:<hex>``) are what its files must be. Raises PoolError, AgainError."""
    if model.scheme == "hf":
        listing = await list_repository(model, web)
        whole = not (model.file or model.quantisation)
        found = _repository(model, listing, web) if whole else _in_repository(model, listing, web.hub)
    elif model.scheme == "oci":
        found = _in_registry(model, await find_artifact(model, web))
    elif model.scheme == "s3":
        found = _in_bucket(model, web.buckets)
    else:
        found = _at_address(model)
    if not digests:
        return found
    count = found.weights or len(found.files)
    if len(digests) != count:
        have = (
            f"{count} files{' of weights' if found.is_folder else ''}, and provisioning.model.checksum has {len(digests)} digests"
        )
        raise SpecError(f"cannot verify {model.id}: it has {have}", hint="list one per file, in their order")
    checked = tuple(_with_digest(file, digest) for file, digest in zip(found.files, digests, strict=False))
    return replace(found, files=(*checked, *found.files[count:]))


def _with_digest(file: RemoteFile, digest: str) -> RemoteFile:
    wanted = digest.removeprefix("sha256:")
    if file.sha256 not in (None, wanted):
        raise SpecError(
            f"cannot use {file.name}: digest mismatch: expected sha256:{wanted}, and the hub has sha256:{file.sha256}",
            code="DIGEST_MISMATCH", status=422,
            hint="name a revision (hf:ORG/REPO@REVISION/FILE), or correct provisioning.model.checksum",
        )  # fmt: skip
    return replace(file, sha256=wanted)


def _at_address(model: ModelRef) -> RemoteModel:
    url = URL(model.location)
    names = _part_names(url.name or "model") or [url.name or "model"]
    files = tuple(RemoteFile(url if len(names) == 1 else url.with_name(name, keep_query=True), _plain(name)) for name in names)
    port = "" if url.is_default_port() else f"_{url.port}"
    return RemoteModel(model, f"{model.scheme}/{_plain(url.host or 'host')}{port}/{_named(model)}", files)


def _in_registry(model: ModelRef, artifact: Artifact) -> RemoteModel:
    """Its GGUF model, all parts of it: engines find the others by the name of the first."""
    layers, where = gguf_layers(artifact, model), artifact.repository
    names = [_plain(layer.name or f"{where.name}.gguf") for layer in layers]
    if len(layers) > 1 and names != _part_names(names[0]):
        if any(layer.name for layer in layers):
            raise SpecError(f"cannot fetch {model.id}: it has {len(names)} models: {', '.join(names[:_SHOWN])}", status=422)
        names = [f"{_plain(where.name)}-{n:05d}-of-{len(layers):05d}.gguf" for n in range(1, len(layers) + 1)]
    files = tuple(
        RemoteFile(where / "blobs" / layer.digest, name, layer.size, layer.digest.removeprefix("sha256:"))
        for layer, name in zip(layers, names, strict=True)
    )
    port = "" if where.is_default_port() else f"_{where.port}"
    folder = f"oci/{_plain(where.host or 'host')}{port}/{artifact.digest.removeprefix('sha256:')[:40]}"
    return RemoteModel(model, folder, files, artifact.digest)


def _in_bucket(model: ModelRef, buckets: BucketAccess) -> RemoteModel:
    """The object of that key; all parts, where it is the first of a split model."""
    folder, slash, name = model.location.rpartition("/")
    names = _part_names(name) or [name]
    parts = [replace(model, location=f"{folder}{slash}{one}") for one in names]
    files = tuple(RemoteFile(buckets.address(part), _plain(one)) for part, one in zip(parts, names, strict=True))
    bucket = model.location.removeprefix("s3://").partition("/")[0]
    return RemoteModel(model, f"s3/{_plain(bucket)}/{_named(model)}", files)


def _named(model: ModelRef) -> str:
    """A name for the folder of what has no version that can be told."""
    return hashlib.sha256(model.id.encode()).hexdigest()[:16]


def _plain(name: str) -> str:
    """A name that is nothing but a name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-120:].lstrip(".") or "model"


def chosen_in(listing: HubListing, model: ModelRef) -> list[HubFile]:
    """The files that ``model`` stands for in a repository, those of a split model in their order.

    Raises SpecError, with ``missing`` in its details where some parts of a model are there and others are not.
    """
    return _by_file(model, listing) if model.file else _by_quantisation(model, listing)


def _in_repository(model: ModelRef, listing: HubListing, hub: HubAccess) -> RemoteModel:
    chosen = chosen_in(listing, model)
    return RemoteModel(model, f"hf/{model.location}/{listing.commit}", _on_hub(model, listing, chosen, hub), listing.commit)


def _repository(model: ModelRef, listing: HubListing, web: Web) -> RemoteModel:
    """All that an engine needs of it, as a folder of its own beside files that were fetched alone."""
    weights, beside = needed_files(model, listing, web.policy)
    files = _on_hub(model, listing, [*weights, *beside], web.hub)
    return RemoteModel(model, f"hf/{model.location}/{listing.commit}-all", files, listing.commit, len(weights))


def _on_hub(model: ModelRef, listing: HubListing, chosen: Sequence[HubFile], hub: HubAccess) -> tuple[RemoteFile, ...]:
    base = hub.endpoint / model.location / "resolve" / listing.commit
    return tuple(
        RemoteFile(base.joinpath(*file.path.split("/")), file.path, file.size, file.sha256, file.blob) for file in chosen
    )


def _by_file(model: ModelRef, listing: HubListing) -> list[HubFile]:
    folder, slash, name = model.file.rpartition("/")
    wanted = [f"{folder}{slash}{part}" for part in _part_names(name) or [name]]
    known = {file.path: file for file in listing.files}
    missing = [path for path in wanted if path not in known]
    if missing:
        problem = _not_there(model, f"there is no {missing[0]} in it", listing)
        problem.details = {"missing": missing} if len(missing) < len(wanted) else {}
        raise problem
    return [known[path] for path in wanted]


def _by_quantisation(model: ModelRef, listing: HubListing) -> list[HubFile]:
    """The one model whose file is named so: all parts of it."""
    named = re.compile(rf"(?:^|[-._/]){re.escape(model.quantisation)}(?:[-._/]|$)", re.IGNORECASE)
    models = models_in(listing)
    matches = [stem for stem in models if named.search(stem)]
    if len(matches) != 1:
        many = f"{len(matches)} models in it are named so" if matches else "no model in it is named so"
        raise _not_there(model, many, listing)
    first = models[matches[0]][0]
    return _by_file(replace(model, file=first.path), listing)


def models_in(listing: HubListing) -> dict[str, list[HubFile]]:
    """GGUF models by what their files are called without their numbers; projectors of images are no models."""
    found: dict[str, list[HubFile]] = {}
    for file in listing.files:
        split = _PART.fullmatch(file.path)
        if file.path.lower().endswith(".gguf") and not file.path.rpartition("/")[2].lower().startswith("mmproj"):
            found.setdefault(split["stem"] if split else file.path[: -len(".gguf")], []).append(file)
    return found


def _part_names(name: str) -> list[str]:
    """All parts, where ``name`` is the first of a split model. Raises SpecError for another part."""
    split = _PART.fullmatch(name)
    if split is None or not 1 < int(split["count"]) <= MAX_PARTS:
        return []
    if int(split["number"]) != 1:
        first = f"{split['stem']}-00001-of-{split['count']}{split['suffix']}"
        raise SpecError(f"cannot fetch {name} alone: it is one of {int(split['count'])} parts", hint=f"name {first}")
    return [f"{split['stem']}-{n:05d}-of-{split['count']}{split['suffix']}" for n in range(1, int(split["count"]) + 1)]


def _not_there(model: ModelRef, why: str, listing: HubListing) -> SpecError:
    names = sorted(files[0].path for files in models_in(listing).values()) or sorted(file.path for file in listing.files)
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return SpecError(
        f"cannot fetch {model.id}: {why}", status=422, hint=f"it has: {', '.join(names[:_SHOWN]) or 'no file'}{more}"
    )
