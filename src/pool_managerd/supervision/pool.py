"""The record of one pool: what it is to run, where its lifecycle stands, and what is known of its launch.

It holds no machinery. Its actor (actor.py) is the only one that writes to it; everybody else reads, and asks the actor
for changes by posting an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, PreparedEngine
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Instance, Policy, PoolState
from pool_managerd.errors import PoolError, SpecError
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.log_places import LogPlaces


@dataclass(frozen=True, slots=True)
class Definition:
    """What a pool is to run: as it is configured, or ``submitted`` by a request or a handoff file; and by which rules.

    ``barred`` says why the engine that was submitted to an earlier daemon does not run.
    """

    policy: Policy
    config: PoolConfig | None = None
    submitted: AnyEngine | None = None
    barred: PoolError | None = None

    @property
    def external(self) -> bool:
        """True for an engine that somebody else runs."""
        if self.submitted is not None:
            return isinstance(self.submitted, AttachedEngine)
        return self.config is not None and self.config.provisioning.mode == "external"

    @property
    def announced(self) -> bool:
        """True for one that a handoff file told of: the file is theirs, neither written nor removed here."""
        return self.config is None and self.external

    def named(self, instance: InstanceId) -> Definition:
        """As this replica runs it: a submitted engine has the name of its replica in itself."""
        if isinstance(self.submitted, PreparedEngine):
            return replace(self, submitted=replace(self.submitted, replica_id=instance.replica_id))
        return self

    @property
    def mask(self) -> DeviceMask | None:
        """What is said about GPUs; None for nothing, and for a text that is no mask."""
        try:
            return self.required_mask()
        except SpecError:  # a handoff file's mask is stored as it is, not validated
            return None

    def required_mask(self) -> DeviceMask | None:
        """As ``mask``; raises SpecError for a text that is no mask."""
        if self.submitted is not None:
            text = self.submitted.device_mask
            if text is None and isinstance(self.submitted, PreparedEngine):
                text = self.submitted.env.get("CUDA_VISIBLE_DEVICES")
            return None if text is None else DeviceMask.parse(text)
        return self.config.mask if self.config is not None else None


class Role(StrEnum):
    """Which of a pool's two instances a record is of, while one replaces the other."""

    CURRENT = "current"
    CANDIDATE = "candidate"
    """It is tried, and nobody but the reload knows of it."""
    RETIRING = "retiring"
    """Another one has its place; its leases are still in flight."""


@dataclass(slots=True)
class Pool:
    """One pool, or the other instance of one. ``last_drain`` is the outcome of the latest drain, ``launched_as`` a digest of
    what this daemon launched last; ``successor`` has taken this one's place.
    """

    pool_id: str
    definition: Definition
    state: PoolState
    launch: Launch
    role: Role = Role.CURRENT
    successor: Pool | None = None
    log_places: LogPlaces = field(default_factory=LogPlaces)
    last_drain: Mapping[str, Any] = field(default_factory=dict)
    launched_as: Mapping[str, str] | None = None

    def latest(self) -> Pool:
        """What the pool's id stands for now, whoever has had this record meanwhile."""
        pool = self
        while pool.successor is not None:
            pool = pool.successor
        return pool

    @property
    def current(self) -> bool:
        """It is what the pool's id stands for, to everybody."""
        return self.role is Role.CURRENT

    @property
    def tried_as(self) -> str | None:
        """The replica that a reload tries beside the pool's own engine; None for any other."""
        return self.instance_id.replica_id if self.role is Role.CANDIDATE else None

    @property
    def instance(self) -> Instance:
        """The launch that runs, or the last one."""
        return self.state.active

    @property
    def instance_id(self) -> InstanceId:
        """The replica that files, ports and reservations are kept by: the engine's own name for itself, where it has one."""
        engine = self.launch.prepared or self.submitted
        return self.state.active.id if engine is None else engine.instance_id

    @property
    def config(self) -> PoolConfig | None:
        return self.definition.config

    @property
    def submitted(self) -> AnyEngine | None:
        return self.definition.submitted
