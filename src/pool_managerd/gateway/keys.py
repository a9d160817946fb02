"""API keys of the gateway: hashed at rest, each with the models that it may ask for, its end, and how much at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from pool_managerd.config import path_from
from pool_managerd.errors import NodeError, RequestError, SpecError
from pool_managerd.gateway import private_json

log = structlog.get_logger("pool_managerd.gateway")
_PREFIX = "pm-"
_MAX_NAME = 64
_MAX_BYTES = 1 << 20
_LOOK_S = 1.0
KEY_HEADERS = frozenset({b"authorization", b"x-api-key"})
"""Where clients put them; engines never see those."""


@dataclass(frozen=True, slots=True)
class Key:
    """``models``: names that it may ask for; empty: all. ``expires_at`` is a unix second, ``concurrency`` how many requests at
    once, ``daily_tokens`` how many in a day, of prompts and answers.
    """

    name: str
    sha256: str
    created_at: int
    models: tuple[str, ...] = ()
    expires_at: int | None = None
    concurrency: int | None = None
    daily_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Keys:
    keys: list[Key]


_KEYS = TypeAdapter(_Keys)


class KeyFile:
    """The keys in the file at ``place``, which is read again when it has changed. While it cannot be used, those before hold."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._seen: tuple[int, int, int] | None = None
        self._looked_at = 0.0
        self._keys: dict[str, Key] = {}
        self._told: str | None = None

    def all(self) -> list[Key]:
        """As they are now, by name. Raises SpecError for a file that cannot be used."""
        self._look()
        return sorted(self._keys.values(), key=lambda key: key.name)

    def named_by(self, headers: Mapping[str, str]) -> Key:
        """Whose request it is. Raises RequestError 401: no key, an unknown one, or one that has expired."""
        given = _given(headers)
        if given is None:
            raise _refused("MISSING_TOKEN", "cannot serve the request without an API key")
        self._look_again()
        key = self._keys.get(hashlib.sha256(given.encode("utf-8", "surrogateescape")).hexdigest())
        if key is None:
            raise _refused("BAD_TOKEN", "cannot serve the request: its API key is not known")
        if key.expires_at is not None and time.time() >= key.expires_at:
            raise _refused("BAD_TOKEN", f"cannot serve the request: the API key '{key.name}' has expired")
        return key

    def add(
        self, name: str, models: tuple[str, ...] = (), expires_at: int | None = None, concurrency: int | None = None,
        daily_tokens: int | None = None,
    ) -> str:  # fmt: skip
        """A new key, which is told once, here. Raises SpecError for a name that is taken, or that is none."""
        if not (0 < len(name) <= _MAX_NAME and name.isprintable() and name == name.strip()):
            raise SpecError(f"cannot add a key of that name: it must be 1 to {_MAX_NAME} letters, digits or signs")
        value = _PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(value.encode()).hexdigest()
        with self._alone():
            keys = self.all()
            if any(key.name == name for key in keys):
                raise SpecError(f"cannot add a key named '{name}': there is one", hint="choose another name, or remove it first")
            self._write([*keys, Key(name, digest, int(time.time()), models, expires_at, concurrency, daily_tokens)])
        return value

    def remove(self, name: str) -> None:
        """Raises RequestError when there is none of that name."""
        with self._alone():
            keys = self.all()
            if all(key.name != name for key in keys):
                raise RequestError(f"key '{name}' not found", code="KEY_NOT_FOUND", status=404)
            self._write([key for key in keys if key.name != name])

    def _look_again(self) -> None:
        """Where the last look is a while ago. A file that cannot be used is told once, and locks nobody out."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        try:
            self._look()
            self._told = None
        except SpecError as problem:
            if self._told != problem.message:
                self._told = problem.message
                log.error(f"The keys that were read before hold on: {problem.message}", action="keys", hint=problem.hint)

    def _look(self) -> None:
        try:
            found = self.place.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, {}
            return
        except OSError as error:
            raise SpecError(f"cannot use the keys in {self.place}: {error.strerror}") from error
        seen = (found.st_mtime_ns, found.st_size, found.st_ino)
        if seen == self._seen:
            return
        if found.st_mode & 0o022:
            raise SpecError(f"cannot use the keys in {self.place}: other users may write to it", hint=f"chmod 600 {self.place}")
        self._keys = {key.sha256: key for key in _parsed(self.place)}
        self._seen = seen

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One who changes the file at a time, of all processes."""
        try:
            lock = os.open(self.place.with_name(self.place.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise NodeError(f"cannot write the keys to {self.place}: {error.strerror}", code="STATE_UNWRITABLE") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, keys: list[Key]) -> None:
        try:
            private_json.write(self.place, {"keys": [asdict(key) for key in keys]}, durable=True)
        except OSError as error:
            raise NodeError(f"cannot write the keys to {self.place}: {error.strerror}", code="STATE_UNWRITABLE") from error


def key_file(base: Path, written: Path | None) -> KeyFile | None:
    """The configured one; None where keys are not asked for."""
    return None if written is None else KeyFile(path_from(base, written))


def _parsed(place: Path) -> list[Key]:
    try:
        with place.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        return _KEYS.validate_json(raw, strict=True).keys
    except OSError as error:
        raise SpecError(f"cannot use the keys in {place}: {error.strerror}") from error
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        why = f"{where}: {first['msg']}" if where else first["msg"]
        raise SpecError(f"cannot use the keys in {place}: {why}", hint="pool-managerd keys add writes the file") from None


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
