"""Handoff files of external engines (SPEC §12): whoever drops one into ``engines/`` registers a pool."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from pool_managerd.config import is_pool_id
from pool_managerd.core.engines import DEFAULT_ENGINE
from pool_managerd.core.handoff import Handoff
from pool_managerd.errors import NodeError
from pool_managerd.runtime.files import LATEST_HANDOFF, RuntimeFiles, is_own_handoff

_INTERVAL_S = 1.0
_MAX_FILES = 1024
_MAX_TEXT = 4096
_METADATA = ipaddress.ip_address("fd00:ec2::254")
"""Where a cloud hands out credentials over IPv6; over IPv4 it is a link-local address."""

_Key = tuple[int, int, int]


class HandoffWatcher:
    """Looks into ``engines/`` every second and tells about each new content once.

    Ignored: ``engine.json``, files of ours, names that start with a dot, objects without ``pool_id`` and a URL.
    ``on_handoff`` gets the handoff and how long reading it took, in ms; ``on_error`` a path and a sentence, once
    per content, and the file is tried again when it changes. What the callbacks raise ends ``run``.
    """

    def __init__(
        self,
        files: RuntimeFiles,
        on_handoff: Callable[[Handoff, float], None],
        on_error: Callable[[str, str], None],
    ) -> None:
        self._directory = files.engines
        self._on_handoff = on_handoff
        self._on_error = on_error
        self._seen: dict[str, _Key] = {}
        self._trouble = ""

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            self.poll_once()
            await asyncio.sleep(_INTERVAL_S)

    def poll_once(self) -> None:
        """Look once, and tell about what is new or changed since the last look."""
        found = self._list()
        self._seen = {name: key for name, key in self._seen.items() if name in found}
        for name, key in found.items():
            if self._seen.get(name) != key:
                self._seen[name] = key
                self._read(name)

    def _list(self) -> dict[str, _Key]:
        found: dict[str, _Key] = {}
        try:
            with self._directory.opened() as fd, os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name.endswith(".json") and not entry.name.startswith(".") and entry.name != LATEST_HANDOFF:
                        status = entry.stat(follow_symlinks=False)
                        found[entry.name] = (status.st_mtime_ns, status.st_size, status.st_ino)
                    if len(found) >= _MAX_FILES:
                        break
        except (OSError, NodeError) as error:
            if str(error) != self._trouble:
                self._on_error(str(self._directory.path), f"cannot look for handoff files: {error}")
            self._trouble = str(error)
            return dict(self._seen)
        self._trouble = ""
        return dict(sorted(found.items()))

    def _read(self, name: str) -> None:
        started = time.monotonic()
        path = str(self._directory.path / name)
        try:
            content = self._directory.read_object(name)
            handoff = None if is_own_handoff(name, content) else parse_handoff(content, path)
        except FileNotFoundError:
            return  # gone between listing and reading
        except (OSError, ValueError, NodeError) as error:
            self._on_error(path, f"cannot use the handoff file {path}: {error}")
            return
        if handoff is not None:
            self._on_handoff(handoff, (time.monotonic() - started) * 1000)


def parse_handoff(content: Mapping[str, Any], path: str) -> Handoff | None:
    """A handoff from its JSON object; None when it names no pool or no URL and so is another kind of file.

    Synonyms are accepted: ``endpoint`` for ``url``, ``slots`` for ``slots_total``, ``gpu_device`` for
    ``device_mask``. Raises ValueError with the key that is wrong.
    """
    url = _text(content, "url", "endpoint")
    pool_id = _text(content, "pool_id")
    if not url or not pool_id:
        return None
    replica_id = _text(content, "replica_id") or "r0"
    for key, value in (("pool_id", pool_id), ("replica_id", replica_id)):
        if not is_pool_id(value):
            raise ValueError(f"{key} may have letters, digits, '.', '_' and '-' only")
    model = content.get("model")
    mask = content.get("device_mask", content.get("gpu_device"))
    return Handoff(
        pool_id=pool_id,
        replica_id=replica_id,
        url=_base_url(url),
        engine=_text(content, "engine") or DEFAULT_ENGINE,
        engine_version=_text(content, "engine_version"),
        device_mask=str(mask) if type(mask) is int else _text(content, "device_mask", "gpu_device"),
        slots_total=_count(content, "slots_total", "slots"),
        slots_free=_count(content, "slots_free"),
        model_path=_text(model, "path") if isinstance(model, Mapping) else _text(content, "model_path"),
        pid=_count(content, "pid"),
        path=path,
    )


def _first(content: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    return next(((key, content[key]) for key in keys if content.get(key) is not None), (keys[0], None))


def _text(content: Mapping[str, Any], *keys: str) -> str | None:
    key, value = _first(content, keys)
    if value is not None and (not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable()):
        raise ValueError(f"{key} must be a short printable text")
    return value


def _count(content: Mapping[str, Any], *keys: str) -> int | None:
    key, value = _first(content, keys)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31):
        raise ValueError(f"{key} must be a whole number, 0 or more")
    return value


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = None
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password
    if parts.scheme not in ("http", "https") or not parts.hostname or not port or extra or any(c.isspace() for c in text):
        raise ValueError("url must look like http://HOST:PORT")
    if not _may_be_an_engine(parts.hostname):
        raise ValueError(f"url must name the address of an engine, which {parts.hostname[:80]} is not")
    return text.rstrip("/")


def _may_be_an_engine(host: str) -> bool:
    """False for addresses, however they are written, where no engine is: link-local ones answer with a cloud's credentials."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 2852039166 and 0xa9fea9fe, as a resolver reads them
        except OSError:
            return True
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return not (address.is_link_local or address.is_multicast or address.is_unspecified or address == _METADATA)
