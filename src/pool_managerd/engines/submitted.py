"""A PreparedEngine that a caller submits as JSON (SPEC §6.5): checked strictly, then run exactly as given."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from pool_managerd.config import Mode, is_pool_id
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, PreparedEngine
from pool_managerd.core.engines import DEFAULT_ENGINE, ENGINES
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.redaction import is_secret_variable, masked_argv, named_secrets
from pool_managerd.errors import SpecError

MAX_FLAGS = 1024
MAX_ENV = 256
MAX_TEXT = 32_768
MAX_PATH = 4_096
MAX_TOTAL = 128 * 1024
MAX_SLOTS = 65_536

_REQUIRED = ("binary_path", "port")
_KNOWN = (
    "binary_path",
    "device_mask",
    "engine",
    "engine_version",
    "env",
    "flags",
    "host",
    "model_path",
    "pool_id",
    "port",
    "provisioning_mode",
    "replica_id",
    "slots_total",
)
_STORED = frozenset(_KNOWN) - {"pool_id"}


def prepared_from_json(body: Mapping[str, Any], pool_id: str) -> PreparedEngine:
    """The engine that ``body`` describes, bare or as ``{"prepared": {…}}``, for the pool of the path.

    ``binary_path`` and ``port`` are required. Flags keep their order and are not normalised. Raises SpecError (400)
    naming the key: unknown, missing, of the wrong type, out of bounds, or a ``pool_id`` other than the path's.
    """
    fields = _unwrap(body)
    _check_keys(fields, pool_id)
    reader = _Reader(fields, pool_id)
    if reader.text("pool_id", pool_id) != pool_id:
        shown = str(fields["pool_id"])[:80]
        raise _wrong(pool_id, f"pool_id is {shown!r} and the path says {pool_id!r}", "send it to its own pool's path")
    engine = PreparedEngine(
        pool_id=pool_id,
        binary_path=reader.text("binary_path", "", longest=MAX_PATH),
        flags=reader.texts("flags"),
        host=reader.host(),
        port=reader.number("port", 1, 65_535, 0),
        model_path=reader.optional_text("model_path", longest=MAX_PATH),
        engine=reader.choice("engine", tuple(ENGINES), DEFAULT_ENGINE),
        engine_version=reader.text("engine_version", "unknown", longest=200),
        replica_id=reader.replica_id(),
        device_mask=reader.device_mask(),
        provisioning_mode=reader.choice("provisioning_mode", get_args(Mode), "source"),
        slots_total=reader.number("slots_total", 1, MAX_SLOTS, 1),
        env=reader.environment(),
        verbatim=True,
    )
    if engine.size_chars > MAX_TOTAL:
        raise _wrong(
            pool_id, f"flags and env have {engine.size_chars} characters, more than {MAX_TOTAL}", "put long values in files"
        )
    return engine


def prepared_to_json(engine: AnyEngine) -> dict[str, Any] | None:
    """What `prepared_from_json` reads back; None for an attached engine, which its handoff file announces again.

    Secrets stay in memory (SPEC §16): with some, ``withheld`` names them, and the engine cannot be read back.
    """
    if isinstance(engine, AttachedEngine):
        return None
    kept = {key: value for key, value in asdict(engine).items() if key in _STORED and value is not None}
    kept["flags"] = masked_argv(engine.flags)
    kept["env"] = {name: value for name, value in engine.env.items() if not is_secret_variable(name)}
    withheld = named_secrets(engine.env, engine.flags)
    return kept | ({"withheld": withheld} if withheld else {})


def _unwrap(body: Mapping[str, Any]) -> Mapping[str, Any]:
    if "prepared" not in body:
        return body
    others = sorted(key for key in body if key != "prepared")
    if others:
        raise SpecError(
            f"cannot use this engine: the key {others[0][:80]!r} stands beside 'prepared'", hint="put every key inside it"
        )
    inner = body["prepared"]
    if not isinstance(inner, Mapping):
        raise SpecError("cannot use this engine: 'prepared' must be an object")
    return inner


def _check_keys(fields: Mapping[str, Any], pool_id: str) -> None:
    for key in sorted(fields, key=_KNOWN.__contains__)[: len(_KNOWN) + 1]:  # what is unknown first
        if key == "image_ref":
            raise _wrong(pool_id, "image_ref: containers are not supported yet", "send binary_path")
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_KNOWN)}"
            raise _wrong(pool_id, f"unknown key {key[:80]!r}", hint)
    for key in _REQUIRED:
        if key not in fields:
            raise _wrong(pool_id, f"the key {key!r} is missing", f"required are {' and '.join(_REQUIRED)}")


def _wrong(pool_id: str, reason: str, hint: str | None = None) -> SpecError:
    return SpecError(f"cannot use the submitted engine: {reason}", pool_id=pool_id, hint=hint)


class _Reader:
    """One field after another, each with its type and bounds.

    An absent key takes its default; null does so only where null means absent.
    """

    def __init__(self, fields: Mapping[str, Any], pool_id: str) -> None:
        self._fields = fields
        self._pool_id = pool_id

    def text(self, key: str, default: str, *, longest: int = MAX_TEXT) -> str:
        return self._checked_text(key, self._fields[key], longest) if key in self._fields else default

    def optional_text(self, key: str, *, longest: int = MAX_TEXT) -> str | None:
        return None if self._fields.get(key) is None else self.text(key, "", longest=longest)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._fields.get(key, [])
        if not isinstance(value, list) or len(value) > MAX_FLAGS:
            raise self._bad(key, f"must be a list of at most {MAX_FLAGS} strings")
        return tuple(self._checked_text(f"{key}[{index}]", item, MAX_TEXT, empty=True) for index, item in enumerate(value))

    def number(self, key: str, low: int, high: int, default: int) -> int:
        value = self._fields.get(key, default)
        # In Python a bool is an int; in JSON `true` is no port.
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._bad(key, f"must be a whole number from {low} to {high}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value not in allowed:
            raise self._bad(key, f"must be one of {', '.join(allowed)}")
        return value

    def replica_id(self) -> str:
        """It becomes part of a file name."""
        value = self.text("replica_id", "r0", longest=32)
        if not is_pool_id(value):
            raise self._bad("replica_id", "may have letters, digits, '.', '_' and '-' only")
        return value

    def host(self) -> str:
        """A loopback address: an engine of this node listens for this node alone."""
        value = self.text("host", "127.0.0.1")
        if value == "localhost":
            return "127.0.0.1"
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            address = None
        if address is None or not address.is_loopback:
            raise self._bad("host", f"must be a loopback address such as 127.0.0.1, not {value[:80]!r}")
        return value

    def device_mask(self) -> str | None:
        """As it was written; whether its GPUs exist is for the start to say."""
        value = self.optional_text("device_mask", longest=MAX_PATH)
        if value is not None:
            try:
                DeviceMask.parse(value)
            except SpecError as error:
                raise _wrong(self._pool_id, error.message.removeprefix("cannot use "), error.hint) from error
        return value

    def environment(self) -> dict[str, str]:
        value = self._fields.get("env", {})
        if not isinstance(value, Mapping) or len(value) > MAX_ENV:
            raise self._bad("env", f"must be an object of at most {MAX_ENV} strings")
        for name, text in value.items():
            if not name or "=" in name or "\0" in name or len(name) > 256:
                raise self._bad("env", f"has the name {name[:80]!r}, which is no variable name")
            self._checked_text(f"env.{name}", text, MAX_TEXT, empty=True)
        return dict(value)

    def _checked_text(self, key: str, value: Any, longest: int, *, empty: bool = False) -> str:
        if not isinstance(value, str):
            raise self._bad(key, "must be a string")
        if "\0" in value or len(value) > longest or not (value or empty):
            raise self._bad(key, f"must be {'' if empty else 'non-empty '}text of at most {longest} characters without NUL")
        return value

    def _bad(self, key: str, rule: str) -> SpecError:
        return _wrong(self._pool_id, f"{key} {rule}")
