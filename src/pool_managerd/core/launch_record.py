"""One launch as one value on disk: what runs and with what, so that another daemon can tell whether that is what it wants.

It goes with the order to the engine's shim and stands in the shim's record, opaque to everything in between. Secrets are in the
digests alone (SPEC §16). Its JSON is versioned: unknown keys are ignored, a newer version is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.redaction import masked_argv

SCHEMA_VERSION = 1
MAX_ARGV_BYTES = 16 << 10
"""Of the shown command line as JSON: the record of a launch must stay small enough to be read; the digest is of all of it."""


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """``argv`` is as it may be shown, and may lack its end; ``argv_digest`` is of all of it as it is, ``env_digest`` of the
    variables that the engine was prepared with (sha256, hex).

    ``reserved_bytes`` is by GPU UUID; ``log_mark`` is how long each part of the log was before, by inode. Times are unix ms:
    when the launch was decided, and when its order was given.
    """

    instance: InstanceId
    epoch: int
    argv: tuple[str, ...]
    argv_digest: str
    env_digest: str
    engine: str
    engine_version: str
    model_id: str | None
    model_path: str | None
    port: int
    url: str
    health_path: str
    slots_total: int
    device_uuids: tuple[str, ...]
    reserved_bytes: Mapping[str, int]
    log_mark: Mapping[int, int]
    decided_at_ms: int
    order_at_ms: int

    def to_json(self) -> dict[str, Any]:
        """JSON-able; ``from_json`` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("instance", "log_mark")}
        return {
            "schema_version": SCHEMA_VERSION,
            "pool_id": self.instance.pool_id,
            "replica_id": self.instance.replica_id,
            **plain,
            "argv": list(self.argv),
            "device_uuids": list(self.device_uuids),
            "reserved_bytes": dict(self.reserved_bytes),
            "log_mark": {str(inode): size for inode, size in self.log_mark.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LaunchRecord:
        """Raises ValueError for a newer version, and naming the key that is missing or mistyped."""
        version = _number(data, "schema_version")
        if version > SCHEMA_VERSION:
            raise ValueError(f"cannot use a launch record of version {version}: this one knows {SCHEMA_VERSION}")
        marks = _numbers(data, "log_mark")
        if not all(inode.isdecimal() for inode in marks):
            raise _wrong("log_mark")
        return cls(
            instance=InstanceId(_text(data, "pool_id"), _text(data, "replica_id")),
            epoch=_number(data, "epoch"),
            argv=_texts(data, "argv"),
            argv_digest=_text(data, "argv_digest"),
            env_digest=_text(data, "env_digest"),
            engine=_text(data, "engine"),
            engine_version=_text(data, "engine_version"),
            model_id=None if data.get("model_id") is None else _text(data, "model_id"),
            model_path=None if data.get("model_path") is None else _text(data, "model_path"),
            port=_number(data, "port"),
            url=_text(data, "url"),
            health_path=_text(data, "health_path"),
            slots_total=_number(data, "slots_total"),
            device_uuids=_texts(data, "device_uuids"),
            reserved_bytes=_numbers(data, "reserved_bytes"),
            log_mark={int(inode): size for inode, size in marks.items()},
            decided_at_ms=_number(data, "decided_at_ms"),
            order_at_ms=_number(data, "order_at_ms"),
        )


def record_of(
    engine: PreparedEngine, *, epoch: int, reserved_bytes: Mapping[str, int], log_mark: Mapping[int, int], decided_at_ms: int,
    order_at_ms: int,
) -> LaunchRecord:  # fmt: skip
    """What a launch of ``engine`` is, as it is written down."""
    return LaunchRecord(
        instance=engine.instance_id, epoch=epoch, argv=_bounded(masked_argv(engine.argv)), argv_digest=argv_digest(engine.argv),
        env_digest=env_digest(engine.env), engine=engine.engine, engine_version=engine.engine_version, model_id=engine.model_id,
        model_path=engine.model_path, port=engine.port, url=engine.url, health_path=engine.health_path,
        slots_total=engine.slots_total, device_uuids=engine.device_uuids, reserved_bytes=dict(reserved_bytes),
        log_mark=dict(log_mark), decided_at_ms=decided_at_ms, order_at_ms=order_at_ms,
    )  # fmt: skip


def argv_digest(argv: Sequence[str]) -> str:
    """sha256 of the exact words, in their order."""
    return _digest(list(argv))


def env_digest(env: Mapping[str, str]) -> str:
    """sha256 of the exact variables, in whatever order they are."""
    return _digest(sorted(env.items()))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _bounded(argv: Sequence[str]) -> tuple[str, ...]:
    kept: list[str] = []
    left = MAX_ARGV_BYTES
    for word in argv:
        left -= len(json.dumps(word)) + 2
        if left < 0:
            break
        kept.append(word)
    return tuple(kept)


def _wrong(key: str) -> ValueError:
    return ValueError(f"cannot use a launch record: its {key} is missing or of another type")


def _text(data: Mapping[str, Any], key: str) -> str:
    if not isinstance(value := data.get(key), str):
        raise _wrong(key)
    return value


def _number(data: Mapping[str, Any], key: str) -> int:
    if type(value := data.get(key)) is not int:
        raise _wrong(key)
    return value


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(key)
    return tuple(value)


def _numbers(data: Mapping[str, Any], key: str) -> dict[str, int]:
    value = data.get(key)
    if not isinstance(value, dict) or not all(type(item) is int for item in value.values()):
        raise _wrong(key)
    return dict(value)
