"""Bodies of requests, for checking what comes in and for the OpenAPI document. Built when first used, as the answers are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pool_managerd.config import POOL_ID_PATTERN, Engine, Mode
from pool_managerd.config.values import Digest
from pool_managerd.core.bench import MAX_PROMPT_TOKENS, MAX_RUNS, MAX_TOKENS, PROMPT_TOKENS, RUNS, TOKENS
from pool_managerd.core.demand.queue import MAX_PRIORITY
from pool_managerd.core.engines import DEFAULT_ENGINE
from pool_managerd.core.purge import MAX_MODELS

MAX_DEADLINE_MS = 86_400_000
MAX_TTL_MS = 604_800_000


class Body(BaseModel):
    """A request body: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


class NoBody(Body):
    """No body, or an empty object."""


class DrainBody(Body):
    deadline_ms: Annotated[int, Field(ge=0, le=MAX_DEADLINE_MS)] | None = Field(
        None, description="How long leases may take to end; lifecycle.drain_deadline_ms when absent."
    )


class ReloadBody(Body):
    """At least one of the first four. ``engine`` replaces a submitted engine, the others change a configured pool."""

    new_model_ref: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(None, description="Another model.")
    engine: dict[str, Any] | None = Field(None, description="A PreparedEngine.")
    changes: Annotated[dict[str, Any], Field(max_length=64)] | None = Field(
        None, description="Keys of the pool's configuration; null for a key that is to be as if it were not written."
    )
    reset: bool = Field(False, description="What earlier reloads have changed does not hold any more: as the file says.")
    drain_deadline_ms: Annotated[int, Field(ge=0, le=MAX_DEADLINE_MS)] | None = Field(
        None, description="How long leases may take to end; then the reload is given up, and the engine serves on."
    )
    strategy: Literal["blue_green", "sleep_old", "stop_start"] | None = Field(
        None,
        description="Absent: blue_green where there is room for both, sleep_old where the engine can sleep, else stop_start.",
    )
    idempotency_key: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="The caller's own name for this request: sent again, it is the same reload."
    )


class ApplyBody(Body):
    """The daemon's file as it is, ``text`` in its place, or one of the history in its place. The latter two are for the daemon's
    own user and root, on this machine: they write the file.
    """

    text: Annotated[str, Field(max_length=1_000_000)] | None = Field(None, description="What the file is to say: YAML or TOML.")
    number: Annotated[int, Field(ge=1)] | None = Field(None, description="A configuration of the history.")
    prune: bool = Field(False, description="Remove pools that it does not name; else they are kept.")
    expect: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Digest of the plan that was agreed to: another one is refused with PLAN_CHANGED."
    )


class PurgeBody(Body):
    purge_engine: bool = Field(False, description="The engine, too: refused where it is not in a cache of this daemon.")
    purge_models: Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=MAX_MODELS)] = Field(
        [], description="Models, too, by reference: refused where they are not in a cache of this daemon."
    )
    drain_first: bool = Field(True, description="An engine that runs is drained first.")
    delete_cache_dirs: bool = Field(False, description="Also what later starts would use again.")
    force: bool = Field(False, description="An engine that runs is stopped at once.")


class ModelBody(Body):
    ref: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="The model: hf:ORG/REPO/FILE, hf:ORG/REPO:QUANTISATION or https://…"
    )


class ModelGcBody(Body):
    older_than_ms: Annotated[int, Field(ge=0, le=3650 * 86_400_000)] | None = Field(
        None,
        description="Delete all that nobody has needed for so long; absent: models.gc.keep_days, and no more than"
        " models.max_bytes makes go, where it is set.",
    )


class ImportBody(Body):
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="A GGUF file on the daemon's machine, absolute; of a split model the first part. The daemon's user reads it."
    )
    name: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None,
        description="What pools will call it: local:NAME, hf:ORG/REPO/FILE or https://…; absent, local: and the file's name.",
    )
    digests: Annotated[list[Digest], Field(max_length=999)] = Field(
        [], description="sha256:… that it must have, of a split model one for each part."
    )


DeviceNames = Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64)]


class YieldBody(Body):
    devices: DeviceNames = Field([], description="Indices or UUIDs of GPUs; all that there are when empty.")
    for_ms: Annotated[int, Field(ge=1000, le=30 * 86_400_000)] | None = Field(
        None, description="For how long; until it is taken back when absent."
    )


class EndYieldBody(Body):
    devices: DeviceNames = Field([], description="Indices or UUIDs of GPUs; all that are left to others when empty.")


class BenchBody(Body):
    tokens: Annotated[int, Field(ge=2, le=MAX_TOKENS)] | None = Field(
        None, description=f"To make for each request; {TOKENS} when absent, or what a slot has room for."
    )
    prompt_tokens: Annotated[int, Field(ge=1, le=MAX_PROMPT_TOKENS)] | None = Field(
        None, description=f"About so many in each prompt; {PROMPT_TOKENS} when absent, or what a slot has room for."
    )
    runs: Annotated[int, Field(ge=1, le=MAX_RUNS)] = Field(RUNS, description="So often alone, and so often on all slots.")


class LeaseBody(Body):
    holder: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(None, description="Who holds it, human-readable.")
    ttl_ms: Annotated[int, Field(ge=1, le=MAX_TTL_MS)] | None = Field(
        None, description="Ends by itself after this long; absent: never."
    )
    idempotency_key: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="The caller's own name for this request: sent again, it gives the same lease and no second one."
    )


class AcquireBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="A pool's id, served name or alias.")
    wait_ms: Annotated[int, Field(ge=0, le=MAX_DEADLINE_MS)] | None = Field(
        None, description="How long to wait for a slot, loading included; absent: queue.wait_ms."
    )
    ttl_ms: Annotated[int, Field(ge=1, le=MAX_TTL_MS)] | None = Field(
        None, description="The lease ends by itself after this long; absent: never."
    )
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = Field(0, description="A higher one goes first.")
    holder: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(None, description="Who asks, human-readable.")


class RenewBody(Body):
    ttl_ms: Annotated[int, Field(ge=1, le=MAX_TTL_MS)]


_PATH = r"^[^\x00]+$"
_LOOPBACK = r"^(localhost|::1|127(\.(0|[1-9][0-9]?|1[0-9][0-9]|2[0-4][0-9]|25[0-5])){3})$"


class PreparedBody(BaseModel):
    """A PreparedEngine, run verbatim; also accepted wrapped as ``{"prepared": {…}}``. No body: the configured pool."""

    model_config = ConfigDict(extra="forbid", defer_build=True)
    binary_path: str = Field(min_length=1, max_length=4096, pattern=_PATH)
    port: int = Field(ge=1, le=65_535)
    flags: list[str] = Field([], max_length=1024)
    host: str = Field("127.0.0.1", pattern=_LOOPBACK)
    pool_id: str = Field("", description="That of the path, when it is given.")
    replica_id: str = Field("r0", max_length=32, pattern=POOL_ID_PATTERN)
    model_path: str | None = Field(None, min_length=1, max_length=4096, pattern=_PATH)
    engine: Engine = DEFAULT_ENGINE
    engine_version: str = Field("unknown", min_length=1, max_length=200, pattern=_PATH)
    device_mask: str | None = Field(None, min_length=1, max_length=4096, pattern=_PATH)
    slots_total: int = Field(1, ge=1, le=65_536)
    env: dict[str, str] = Field({}, max_length=256)
    provisioning_mode: Mode = "source"
