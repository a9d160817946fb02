"""What a reload means for a pool as it is: what it would run then, or why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pool_managerd.config import Config, PoolConfig
from pool_managerd.config.changes import differences, merged, with_changes
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.lifecycle import Phase, sleeps_evicted, view
from pool_managerd.core.lifecycle.phase import IDLE
from pool_managerd.core.lifecycle.replacing import candidate_beside
from pool_managerd.core.redaction import masked_argv, masked_env, named_secrets
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import RequestError, SpecError
from pool_managerd.supervision import policy
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.pool import Definition, Pool, Role
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services

_RELOADED = frozenset({Phase.READY, *IDLE, Phase.STAGING, Phase.STARTING, Phase.WARMING})


@dataclass(frozen=True, slots=True)
class FileReload(ReloadRequest):
    """To what a file says of the pool, ``to``: nothing beside the file is kept of it."""

    to: PoolConfig | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What ``pool`` is to run instead of ``old``. ``changes`` are all that its file's configuration is changed by then."""

    pool: Pool
    old: Definition
    new: Definition
    changes: Mapping[str, Any]
    deadline_ms: int

    def beside(self) -> Pool:
        """The other instance of the pool, as it would be while this one serves."""
        _, state = candidate_beside(self.pool.state, self.pool.instance_id, self.new.policy)
        return Pool(self.pool.pool_id, self.new.named(state.active.id), state, Launch(), Role.CANDIDATE)

    def in_its_place(self) -> Pool:
        """The pool as it would be: what its instance holds now is its own to use again."""
        return Pool(self.pool.pool_id, self.new, self.pool.state, Launch())

    def model(self) -> str:
        """What it will serve, for people."""
        if self.new.config is not None:
            return self.new.config.model
        return getattr(self.new.submitted, "model_path", None) or "of the engine"

    def differences(self) -> list[dict[str, Any]]:
        """``{key, old, new}`` for each that is not the same."""
        if self.old.config is not None and self.new.config is not None:
            return differences(self.old.config, self.new.config)
        before, after = self.old.submitted, self.new.submitted
        keys = ("binary_path", "flags", "env", "model_path", "port", "slots_total", "ctx", "engine_version")
        if not isinstance(before, PreparedEngine) or not isinstance(after, PreparedEngine):
            return [{"key": "engine", "old": None, "new": getattr(after, "binary_path", None)}]
        pairs = ((key, getattr(before, key), getattr(after, key)) for key in keys)
        return [{"key": key, "old": was, "new": now} for key, was, now in pairs if was != now]


class Targets:
    """Makes them. ``config`` is what is in force."""

    def __init__(self, pools: Pools, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._config = pools, services, config

    def of(self, request: ReloadRequest) -> Target:
        """Raises PoolError for a pool that is not there or cannot be reloaded now, and for what it cannot run."""
        pool = self._pools.get(request.pool_id)
        self._check(pool)
        asked = request.engine is None and not isinstance(request, FileReload)
        changes = self._changes_of(pool, request) if asked else {}
        new = self._definition(pool, request, changes).named(pool.instance_id)
        policy.learn_secrets(self._s.events.redactor, pool.pool_id, new)
        deadline_ms = request.drain_deadline_ms
        default_ms = self._config().lifecycle.drain_deadline_ms
        return Target(pool, pool.definition, new, changes, default_ms if deadline_ms is None else deadline_ms)

    def shown(self, target: Target) -> list[dict[str, Any]]:
        """What differs, as it may be told."""
        masked = (
            {**one, "old": _shown(one["key"], one["old"]), "new": _shown(one["key"], one["new"])} for one in target.differences()
        )
        told: list[dict[str, Any]] = self._s.events.redactor.mapping({"changes": list(masked)})["changes"]
        return told

    def base(self, pool: Pool) -> PoolConfig:
        """What the file says of the pool."""
        return next(one for one in self._config().pools if one.id == pool.pool_id)

    def _check(self, pool: Pool) -> None:
        """Raises RequestError for a pool that cannot be reloaded now."""
        why, code = "", "OPERATION_IN_PROGRESS"
        if pool.definition.external:
            why, code = "somebody else runs its engine", "INVALID_PARAMS"
        elif pool.state.held or pool.state.quarantined:
            why, code = "it is held" if pool.state.held else "one of its GPUs is quarantined", "POOL_UNAVAILABLE"
        elif pool.instance.phase not in _RELOADED and not sleeps_evicted(pool.state):
            why = f"it is {view(pool.state).state}"
        if why or self._pools.closing:
            raise RequestError(
                f"cannot reload pool '{pool.pool_id}': {why or 'the daemon is shutting down'}", code=code, status=409,
                pool_id=pool.pool_id, retriable=code == "OPERATION_IN_PROGRESS",
            )  # fmt: skip

    def _changes_of(self, pool: Pool, request: ReloadRequest) -> dict[str, Any]:
        if pool.config is None:
            raise SpecError(
                f"cannot change keys of pool {pool.pool_id}: it runs a submitted engine as it is", pool_id=pool.pool_id,
                hint="reload it with another engine",
            )  # fmt: skip
        asked = request.all_changes()
        given = asked.get("provisioning")
        env, flags = (given.get("env"), given.get("flags")) if isinstance(given, Mapping) else (None, None)
        words = [str(word) for word in flags] if isinstance(flags, list) else []
        if named := named_secrets({str(k): str(v) for k, v in env.items()} if isinstance(env, Mapping) else {}, words):
            raise SpecError(
                f"cannot reload pool {pool.pool_id} with what may be secret ({', '.join(named)}): it would be kept on disk",
                pool_id=pool.pool_id, hint="put it into the configuration file",
            )  # fmt: skip
        return merged({}, asked) if request.reset else self._pools.overrides.changes(pool.pool_id, asked)

    def _definition(self, pool: Pool, request: ReloadRequest, changes: Mapping[str, Any]) -> Definition:
        config = self._config()
        if isinstance(request, FileReload):
            return self._pools.definitions.of(pool.pool_id, request.to)
        if request.engine is not None:
            if pool.config is not None:
                raise SpecError(
                    f"cannot run a submitted engine in pool {pool.pool_id}: it is configured", pool_id=pool.pool_id,
                    hint="give changes, or preload another pool",
                )  # fmt: skip
            policy.check_submission(config, pool.pool_id, request.engine)
            policy.check_room(pool, request.engine, self._pools.all())
            return self._pools.definitions.with_engine(pool.pool_id, pool.definition, request.engine)
        new = self._pools.definitions.of(pool.pool_id, with_changes(self.base(pool), changes, config.base_dir))
        if new.external:
            raise SpecError(
                f"cannot reload pool {pool.pool_id} to mode external: somebody else runs such an engine, so there is none to "
                "start, to try and to go back from", pool_id=pool.pool_id,
                hint="attach a pool of another id to it, or write `provisioning: {mode: external, url: …}` of this one into the "
                "configuration file, and apply that",
            )  # fmt: skip
        return new


def _shown(key: str, value: Any) -> Any:
    """Flags and variables without what may be secret in them."""
    if key.endswith("flags") and isinstance(value, list | tuple):
        return masked_argv([str(word) for word in value])
    if isinstance(value, Mapping):
        return masked_env({str(name): str(text) for name, text in value.items()})
    if ".env." in key and value is not None:
        return masked_env({key.rpartition(".")[2]: str(value)})[key.rpartition(".")[2]]
    return value
