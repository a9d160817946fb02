"""One launch as one value on disk: what runs and with what, so that another daemon can tell whether that is what it wants.

It goes with the order to the engine's shim and stands in the shim's record, opaque to everything in between. Secrets are in the
digests alone (SPEC §16). Its JSON is versioned: unknown keys are ignored, a newer version is refused, and what a later release
has added within a version has a default, so that each release can take over what the one before it, or after it, has started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine, Warmup
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.redaction import masked_argv
from pool_managerd.core.slot_cache import SlotSaving

SCHEMA_VERSION = 1
MAX_ARGV_BYTES = 16 << 10
"""Of the shown command line as JSON: the record of a launch must stay small enough to be read; the digest is of all of it."""
_WARMUPS: dict[str, Warmup] = {"completion": "completion", "embedding": "embedding", "rerank": "rerank", "none": "none"}
_ADDED: Mapping[str, type] = {
    "device_mask": str, "ctx": int, "verbatim": bool, "warmup": str, "provisioning_mode": str, "exclusive": bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Which file a name meant at the launch, and that its content is still the same: any change of it changes ``ctime_ns``."""

    path: str
    device: int
    inode: int
    size: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """``argv`` is as it may be shown, and may lack its end; ``argv_digest`` is of all of it as it is, ``env_digest`` of the
    variables that the engine was prepared with (sha256, hex).

    ``reserved_bytes`` is by GPU UUID; ``log_mark`` is how long each part of the log was before, by inode. Times are unix ms:
    when the launch was decided, and when its order was given. ``files`` are what it was started from, as they were then.
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
    device_mask: str | None = None
    ctx: int | None = None
    verbatim: bool = False
    warmup: str = "none"
    provisioning_mode: str = "external"
    exclusive: bool = False
    files: tuple[FileStamp, ...] = ()
    slots: SlotSaving | None = None

    def engine_as_shown(self) -> PreparedEngine:
        """The engine that runs, for whoever only looks at it: its flags are as they may be shown, its variables are not known."""
        host = self.url.partition("://")[2].rpartition(":")[0].strip("[]")
        return PreparedEngine(
            pool_id=self.instance.pool_id, replica_id=self.instance.replica_id, binary_path=self.argv[0] if self.argv else "",
            flags=self.argv[1:], host=host, port=self.port, model_path=self.model_path, model_id=self.model_id,
            engine=self.engine, engine_version=self.engine_version, device_mask=self.device_mask,
            device_uuids=self.device_uuids, provisioning_mode=self.provisioning_mode, slots_total=self.slots_total, ctx=self.ctx,
            health_path=self.health_path, verbatim=self.verbatim, warmup=_WARMUPS.get(self.warmup, "none"),
            slots=self.slots,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """JSON-able; ``from_json`` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("instance", "log_mark", "files", "slots")}
        return {
            "schema_version": SCHEMA_VERSION,
            "pool_id": self.instance.pool_id,
            "replica_id": self.instance.replica_id,
            **plain,
            "argv": list(self.argv),
            "device_uuids": list(self.device_uuids),
            "reserved_bytes": dict(self.reserved_bytes),
            "log_mark": {str(inode): size for inode, size in self.log_mark.items()},
            "files": [asdict(stamp) for stamp in self.files],
            "slots": None if self.slots is None else self.slots.to_json(),
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
            **{name: data[name] for name, kind in _ADDED.items() if isinstance(data.get(name), kind)},
            files=tuple(_stamps(data.get("files"))),
            slots=SlotSaving.from_json(data.get("slots")),
        )


def record_of(
    engine: PreparedEngine, *, epoch: int, reserved_bytes: Mapping[str, int], log_mark: Mapping[int, int], decided_at_ms: int,
    order_at_ms: int, exclusive: bool = False, files: tuple[FileStamp, ...] = (),
) -> LaunchRecord:  # fmt: skip
    """What a launch of ``engine`` is, as it is written down."""
    return LaunchRecord(
        instance=engine.instance_id, epoch=epoch, argv=_bounded(masked_argv(engine.argv)), argv_digest=argv_digest(engine.argv),
        env_digest=env_digest(engine.env), engine=engine.engine, engine_version=engine.engine_version, model_id=engine.model_id,
        model_path=engine.model_path, port=engine.port, url=engine.url, health_path=engine.health_path,
        slots_total=engine.slots_total, device_uuids=engine.device_uuids, reserved_bytes=dict(reserved_bytes),
        log_mark=dict(log_mark), decided_at_ms=decided_at_ms, order_at_ms=order_at_ms, device_mask=engine.device_mask,
        ctx=engine.ctx, verbatim=engine.verbatim, warmup=engine.warmup, provisioning_mode=engine.provisioning_mode,
        exclusive=exclusive, files=files, slots=engine.slots if engine.keeps_slots else None,
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


def _stamps(data: Any) -> Iterator[FileStamp]:
    """Those that can be read; an older release wrote none."""
    for item in data if isinstance(data, list) else ():
        try:
            yield FileStamp(**item)
        except TypeError:
            continue


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


@dataclass(frozen=True, slots=True)
class LeftEngine:
    """What an earlier daemon has left of a pool: an engine that runs still, or that ended when nobody watched it.

    ``started_at`` is a monotonic second of this boot. ``was_ready``: it had been announced. ``exit`` is how it ended, as far as
    its shim has written that down; None while it runs, or when the shim was lost as well.
    """

    launch: LaunchRecord
    started_at: float
    was_ready: bool = False
    exit: ExitRecord | None = None
