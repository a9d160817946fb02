"""What flows between the provisioners, the runtime and the registry: plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pool_managerd.core.engines import DEFAULT_ENGINE, ENGINES
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.sleep_dialect import SleepDialect
from pool_managerd.core.slot_cache import SlotSaving

NOT_FETCHED = "MODEL_NOT_FETCHED"
"""The code of an error that says nothing is wrong but that a model is not on this machine yet: a start fetches it."""

Warmup = Literal["completion", "embedding", "rerank", "none"]
"""What an engine can be asked for its first answer, by the model and the flags that it has."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine's disk (``{id, local_path}``, SPEC §6.3).

    ``digest`` is ``sha256:<hex>`` when the content was hashed (of a split model, its parts' with commas between them);
    ``verified`` is true only when all of it matched what was expected. ``size_bytes`` counts all ``files``: those of a
    split model, ``local_path`` the first of them; empty where it is one file, or a folder. ``weights`` are those files of a
    folder that was fetched which hold the model.
    """

    id: str
    local_path: str
    size_bytes: int = 0
    digest: str | None = None
    verified: bool = False
    files: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The files that have a digest each."""
        return self.files or self.weights or (self.local_path,)


@dataclass(frozen=True, slots=True)
class PreparedEngine:
    """A ready-to-spawn description of one engine process (SPEC §6.5). Making one spawns nothing.

    ``flags`` follow ``binary_path`` in argv in exactly this order. ``health_path`` is probed on ``http://host:port``.
    ``model_files`` are all parts of a split model. ``device_uuids`` are the GPUs that this launch was given. ``verbatim``
    marks an engine submitted by a caller: it runs as given, is not warmed up, and may end by itself: its unasked exit 0 is
    graceful (SPEC §8.5). A server that this version prepares never ends unasked but by failing, whatever its exit code.
    ``slots`` is how the caches of its slots are kept from one launch to the next, if they are.
    """

    pool_id: str
    binary_path: str
    flags: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    model_path: str | None = None
    model_files: tuple[str, ...] = ()
    model_id: str | None = None
    engine: str = DEFAULT_ENGINE
    engine_version: str = "unknown"
    replica_id: str = "r0"
    device_mask: str | None = None
    device_uuids: tuple[str, ...] = ()
    provisioning_mode: str = "external"
    slots_total: int = 1
    ctx: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    health_path: str = "/health"
    verbatim: bool = False
    warnings: tuple[str, ...] = ()
    warmup: Warmup = "completion"
    slots: SlotSaving | None = None

    @property
    def instance_id(self) -> InstanceId:
        """Which replica of its pool it is."""
        return InstanceId(self.pool_id, self.replica_id)

    @property
    def url(self) -> str:
        """Base URL of the engine's HTTP server, without a trailing slash."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def warmable(self) -> bool:
        """Whether we may ask it something of our own: what was submitted runs verbatim, and is asked by its clients alone."""
        return not self.verbatim and self.warmup != "none"

    @property
    def keeps_slots(self) -> bool:
        """Whether the caches of its slots are saved when it is stopped."""
        return self.slots is not None and not self.slots.unable and not self.verbatim

    @property
    def sleep(self) -> SleepDialect | None:
        """How it is put to sleep; None where its flags do not make it able to."""
        kind = ENGINES.get(self.engine)
        dialect = None if kind is None else kind.sleep
        return dialect if dialect is not None and dialect.speaks(self.flags) else None

    @property
    def abilities(self) -> dict[str, bool]:
        """What the lifecycle goes by."""
        return {"warmable": self.warmable, "keeps_slots": self.keeps_slots}

    @property
    def size_chars(self) -> int:
        """Characters of its command line and environment."""
        return sum(map(len, self.argv)) + sum(len(name) + len(value) for name, value in self.env.items())

    @property
    def argv(self) -> tuple[str, ...]:
        """The argument vector, binary first; no shell ever sees it."""
        return (self.binary_path, *self.flags)


@dataclass(frozen=True, slots=True)
class AttachedEngine:
    """An engine that somebody else runs, at ``base_url``: there is no process to own, and nothing is ever signalled."""

    pool_id: str
    base_url: str
    engine: str = DEFAULT_ENGINE
    engine_version: str = "unknown"
    replica_id: str = "r0"
    model_id: str | None = None
    model_path: str | None = None
    device_mask: str | None = None
    slots_total: int = 1
    ctx: int | None = None
    health_path: str = "/health"
    warmup: Warmup = "completion"

    @property
    def instance_id(self) -> InstanceId:
        """Which replica of its pool it is."""
        return InstanceId(self.pool_id, self.replica_id)

    @property
    def url(self) -> str:
        """Base URL of the engine's HTTP server, without a trailing slash."""
        return self.base_url.rstrip("/")


AnyEngine = PreparedEngine | AttachedEngine
"""What a pool has for an engine: a process of its own, or one that it only attaches to."""


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How an engine process ended, as its shim wrote it down.

    Exactly one of ``code`` and ``signal`` is set when the outcome is known; both are None when the shim
    itself was lost ("unknown"). ``max_rss_bytes`` is the peak of the engine process. ``oom_kills`` counts
    kills by the kernel's OOM killer, None where that is not measured: in ``oom_scope`` ``engine`` (its own memory
    cgroup), ``shared`` (one with others in it) or ``host``, in the last two about when it ended. ``oom_line`` is the
    kernel's line that names one of the engine's processes as killed. ``stopped_by_us`` is true when the stop ladder was
    under way.
    """

    code: int | None = None
    signal: int | None = None
    started_at_ms: int = 0
    ended_at_ms: int = 0
    uptime_seconds: float = 0.0
    max_rss_bytes: int = 0
    oom_kills: int | None = None
    oom_scope: str | None = None
    oom_line: str | None = None
    stopped_by_us: bool = False
    log_bytes_dropped: int = 0

    @property
    def known(self) -> bool:
        return self.code is not None or self.signal is not None


@dataclass(frozen=True, slots=True)
class ProgramAnswer:
    """What a program printed when it was run to its end, stderr included; ``problem`` says what went wrong, in words."""

    output: bytes
    problem: str = ""
