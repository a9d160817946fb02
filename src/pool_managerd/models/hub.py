"""The files of a repository on a model hub, by its HTTP API."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any

from yarl import URL

from pool_managerd.errors import NodeError
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.web import Web

MAX_LISTING_BYTES = 16 << 20
MAX_FILES = 20_000
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_BLOB = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """``sha256`` (hex) is known of large files alone: the hub keeps small ones in git, where ``blob`` (hex) is their name."""

    path: str
    size: int | None
    sha256: str | None
    blob: str | None = None


@dataclass(frozen=True, slots=True)
class HubListing:
    """A repository as it is at ``commit``: what is fetched is of that one, whatever is pushed meanwhile."""

    commit: str
    files: tuple[HubFile, ...]


async def list_repository(model: ModelRef, web: Web) -> HubListing:
    """Raises AgainError and PoolError."""
    where = web.hub.endpoint / "api/models" / model.location / "revision" / (model.revision or "main")
    body = await web.read(where.with_query(blobs="true"), {"Accept": "application/json"}, MAX_LISTING_BYTES)
    return await asyncio.to_thread(_read, body, where)


def _read(body: bytes, where: URL) -> HubListing:
    try:
        told = json.loads(body)
        commit, listed = str(told["sha"]), list(told["siblings"])
        if not _COMMIT.fullmatch(commit) or len(listed) > MAX_FILES:
            raise ValueError("no commit, or too many files")
        return HubListing(commit, tuple(file for one in listed if (file := _file(one)) is not None))
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise _odd(where, "its list of files cannot be read") from problem


def _file(told: Any) -> HubFile | None:
    """None for a name that would lead out of the repository's folder."""
    path, size, large = str(told["rfilename"]), told.get("size"), told.get("lfs")
    parts = path.split("/")
    if (
        len(path) > 1024
        or not path.isprintable()
        or max(len(part.encode()) for part in parts) > 255
        or "\\" in path
        or any(part in ("", ".", "..") for part in parts)
    ):
        return None
    digest = str(large.get("sha256") or "").lower() if isinstance(large, dict) else ""
    sha256, blob = digest if _SHA256.fullmatch(digest) else None, str(told.get("blobId") or "").lower()
    known = isinstance(size, int) and size >= 0
    return HubFile(path, size if known else None, sha256, blob if sha256 is None and _BLOB.fullmatch(blob) else None)


def _odd(where: URL, why: str) -> NodeError:
    return NodeError(f"cannot use the hub at {where.host}: {why}", hint="see whether HF_ENDPOINT is right", retriable=True)
