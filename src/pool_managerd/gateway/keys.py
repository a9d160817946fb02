"""API keys of the gateway: hashed at rest, each with the models that it may ask for, its end, and how much at once."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from base64 import b64decode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pool_managerd.config import path_from
from pool_managerd.errors import NodeError, RequestError, SpecError

_PREFIX = "pm-"
_MAX_BYTES = 1 << 20
_LOOK_S = 1.0
KEY_HEADERS = frozenset({b"authorization", b"x-api-key"})
"""Where clients put them; engines never see those."""


@dataclass(frozen=True, slots=True)
class Key:
    """``models``: names that it may ask for; empty: all. ``expires_at`` is a unix second, ``concurrency`` how many requests at
    once.
    """

    name: str
    sha256: str
    created_at: int
    models: tuple[str, ...] = ()
    expires_at: int | None = None
    concurrency: int | None = None


class KeyFile:
    """The keys in the file at ``place``, which is read again when it has changed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._seen: tuple[int, int, int] | None = None
        self._looked_at = 0.0
        self._keys: dict[str, Key] = {}

    def all(self) -> list[Key]:
        """As they are now, by name. Raises SpecError for a file that cannot be used."""
        self._look(at_once=True)
        return sorted(self._keys.values(), key=lambda key: key.name)

    def named_by(self, headers: Mapping[str, str]) -> Key:
        """Whose request it is. Raises RequestError 401: no key, an unknown one, or one that has expired."""
        given = _given(headers)
        if given is None:
            raise _refused("MISSING_TOKEN", "cannot serve the request without an API key")
        self._look()
        key = self._keys.get(hashlib.sha256(given.encode("utf-8", "surrogateescape")).hexdigest())
        if key is None:
            raise _refused("BAD_TOKEN", "cannot serve the request: its API key is not known")
        if key.expires_at is not None and time.time() >= key.expires_at:
            raise _refused("BAD_TOKEN", f"cannot serve the request: the API key '{key.name}' has expired")
        return key

    def add(self, name: str, models: tuple[str, ...] = (), expires_at: int | None = None, concurrency: int | None = None) -> str:
        """A new key, which is told once, here. Raises SpecError for a name that is taken."""
        keys = self.all()
        if any(key.name == name for key in keys):
            raise SpecError(f"cannot add a key named '{name}': there is one", hint="choose another name, or remove it first")
        value = _PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(value.encode()).hexdigest()
        self._write([*keys, Key(name, digest, int(time.time()), models, expires_at, concurrency)])
        return value

    def remove(self, name: str) -> None:
        """Raises RequestError when there is none of that name."""
        keys = self.all()
        if all(key.name != name for key in keys):
            raise RequestError(f"key '{name}' not found", code="KEY_NOT_FOUND", status=404)
        self._write([key for key in keys if key.name != name])

    def _look(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        try:
            found = self.place.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, {}
            return
        seen = (found.st_mtime_ns, found.st_size, found.st_ino)
        if seen == self._seen:
            return
        if found.st_mode & 0o022:
            raise SpecError(f"cannot use the keys in {self.place}: other users may write to it", hint=f"chmod 600 {self.place}")
        self._keys = {key.sha256: key for key in _parsed(self.place)}
        self._seen = seen

    def _write(self, keys: list[Key]) -> None:
        temporary = self.place.with_name(self.place.name + ".new")
        try:
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:  # noqa: PTH123
                json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.place)
        except OSError as error:
            raise NodeError(f"cannot write the keys to {self.place}: {error.strerror}", code="STATE_UNWRITABLE") from error


def key_file(base: Path, written: Path | None) -> KeyFile | None:
    """The configured one; None where keys are not asked for."""
    return None if written is None else KeyFile(path_from(base, written))


def _parsed(place: Path) -> list[Key]:
    with place.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    try:
        return [_key(entry) for entry in json.loads(raw)["keys"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise SpecError(f"cannot use the keys in {place}: {problem}", hint="pool-managerd keys add writes the file") from None


def _key(entry: Mapping[str, Any]) -> Key:
    return Key(
        str(entry["name"]), str(entry["sha256"]), int(entry["created_at"]), tuple(map(str, entry.get("models") or ())),
        entry.get("expires_at"), entry.get("concurrency"),
    )  # fmt: skip


def _given(headers: Mapping[str, str]) -> str | None:
    if key := headers.get("x-api-key", "").strip():
        return key
    scheme, _, value = headers.get("Authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip() or None
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return b64decode(value, validate=True).decode("utf-8").partition(":")[2] or None
    return None


def _refused(code: str, message: str) -> RequestError:
    return RequestError(message, code=code, status=401, hint="send the header Authorization: Bearer KEY")
