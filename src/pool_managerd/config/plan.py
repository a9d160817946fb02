"""What another configuration means for a node that runs: which pools it touches, and how. Pure: nothing is done here.

Pools are told apart by id, and compared by what their keys mean: comments, blanks, the order of keys and pools, and defaults that
are written out change nothing. A pool whose keys are the same is in no plan, whatever else the file says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from pool_managerd.config.changes import differences
from pool_managerd.config.pools import DECIDED, PoolConfig
from pool_managerd.config.schema import Config

_WHOLE = ("auth", "health", "lifecycle", "policy", "preflight", "queue", "reload", "supervision", "together")
_SINGLE = (
    ("gpu", "vram_wait_ms"), ("gpu", "keep_free_mib"), ("gpu", "yield_to"), ("telemetry", "log_level"), ("models", "gc"),
    ("models", "keep_free_bytes"), ("models", "max_bytes"),
)  # fmt: skip
AT_ONCE = (*_WHOLE, *(".".join(path) for path in _SINGLE))
"""Sections and keys that a running daemon takes over. All others, but for ``pools``, wait for its restart."""
POLICY = ("health", "supervision", "lifecycle", "gpu.vram_wait_ms")
"""Those that the rules of every pool are made of."""


class Action(StrEnum):
    """What is done to a pool, in the order in which it is done: what frees memory comes before what needs it."""

    KEEP = "keep"
    """Nothing: the file does not name it, and nobody has said that it may go."""
    REMOVE = "remove"
    """Drained, stopped, forgotten."""
    TAKE_OVER = "take_over"
    """Only what the daemon decides by, or nothing of it runs: no engine is touched."""
    RELOAD = "reload"
    """What runs is replaced, or goes on when the new one does not do."""
    RESTART = "restart"
    """Somebody else runs the engine, or will: this one is let go, the other attached to or started."""
    START = "start"
    """Nothing runs and something is to."""
    ADD = "add"
    """It is new."""


@dataclass(frozen=True, slots=True)
class PoolNow:
    """A pool of the file as it is. ``config`` is in force, what it was reloaded with by hand included: ``reloaded`` names those
    keys. ``serves``: an engine of it runs or loads; ``outdated``: that one was launched by other keys than ``config`` has.
    Where none runs, ``wanted`` says that one is to, ``by_demand`` that demand may start one.
    """

    config: PoolConfig
    serves: bool = False
    wanted: bool = False
    by_demand: bool = False
    outdated: bool = False
    reloaded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One pool. ``config`` is what the file says of it, None for one that goes or is only kept; ``said``: that is something else
    than before. ``changes`` are ``{key, old, new}``, unmasked.
    """

    action: Action
    pool_id: str
    config: PoolConfig | None
    why: str
    changes: tuple[Mapping[str, Any], ...] = ()
    said: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """``at_once`` are the keys that are taken over without touching a pool, ``waiting`` those that need another start of the
    daemon, ``untouched`` how many pools are in no step. ``by_hand`` are those pools that stay what a reload has made of them,
    as the file says them: nothing is done to them by that.
    """

    steps: tuple[Step, ...]
    at_once: tuple[str, ...]
    waiting: tuple[str, ...]
    untouched: int
    by_hand: tuple[PoolConfig, ...] = ()

    @property
    def would_change(self) -> bool:
        """Whether carrying it out changes anything."""
        return bool(self.at_once or any(step.action is not Action.KEEP for step in self.steps))

    @property
    def changes_rules(self) -> bool:
        """Whether the rules of every pool change."""
        return any(key.startswith(POLICY) for key in self.at_once)

    @property
    def digest(self) -> str:
        """Of what would be done, in whatever order: who has seen a plan can ask for this one and no other."""
        found = sorted(self.steps, key=lambda step: (step.action, step.pool_id))
        steps = [[step.action, step.pool_id, [dict(change) for change in step.changes]] for step in found]
        text = json.dumps([steps, self.at_once, self.waiting], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_of(old: Config, new: Config, now: Mapping[str, PoolNow], *, prune: bool = False) -> Plan:
    """How to get from ``old``, what the file said of the pools ``now``, to ``new``. ``prune``: what that does not name goes."""
    before, named = {pool.id: pool for pool in old.pools}, {pool.id for pool in new.pools}
    gone = [pool_id for pool_id in now if pool_id not in named]
    found, by_hand = [_gone(pool_id, prune) for pool_id in gone], []
    for pool in new.pools:
        step = _added(pool) if pool.id not in now else _changed(before[pool.id], now[pool.id], pool)
        if step is not None:
            found.append(step)
        if (
            pool.id in now
            and now[pool.id].reloaded
            and (step is None or not step.said)
            and differences(now[pool.id].config, pool)
        ):
            by_hand.append(pool)
    order = list(Action)
    keys = tuple(changed_keys(old, new))
    at_once = tuple(key for key in keys if key.startswith(AT_ONCE))
    steps = tuple(sorted(found, key=lambda step: order.index(step.action)))
    waiting = tuple(key for key in keys if key not in at_once)
    return Plan(steps, at_once, waiting, len(now) + sum(s.action is Action.ADD for s in steps) - len(steps), tuple(by_hand))


def _gone(pool_id: str, prune: bool) -> Step:
    if prune:
        return Step(Action.REMOVE, pool_id, None, "the file does not name it")
    return Step(
        Action.KEEP, pool_id, None, "the file does not name it; --prune removes it, and so does the next start of the daemon"
    )


def _added(pool: PoolConfig) -> Step:
    why = "it is new" if pool.preload else "it is new, and starts on demand"
    return Step(Action.ADD, pool.id, pool, why)


def _changed(before: PoolConfig, now: PoolNow, new: PoolConfig) -> Step | None:
    """What it was reloaded with by hand stays until the file says something else of it."""
    said = before != new and bool(differences(before, new))  # equal is quickly seen, and most are
    if not said and not now.outdated:
        return None
    changes = tuple(differences(now.config, new)) if said else ()
    keys = [change["key"] for change in changes]
    launch = now.outdated or any(key.partition(".")[0] not in DECIDED for key in keys)
    action, why = _how(now, new, launch=launch)
    if now.outdated and not changes:
        why += ": it was launched by what an earlier configuration said"
    elif not changes:
        why += ": the file says now what it was reloaded with by hand"
    if back := [key for key in now.reloaded if any(one == key or one.startswith(f"{key}.") for one in keys)]:
        why += f"; what it was reloaded with by hand ({', '.join(back)}) does not hold any more"
    return Step(action, new.id, new, why, changes, said)


def _how(now: PoolNow, new: PoolConfig, *, launch: bool) -> tuple[Action, str]:
    external = "external" in (now.config.provisioning.mode, new.provisioning.mode)
    if launch and now.serves and external:
        return Action.RESTART, "somebody else runs its engine: it is let go, and attached to anew"
    if launch and now.serves:
        return Action.RELOAD, "its engine is replaced"
    if launch and now.wanted:
        return Action.START, "it does not run, and is tried again"
    if now.by_demand and not now.serves and new.preload and not now.config.preload:
        return Action.START, "it is to run with the daemon from now on"
    if now.serves:
        return Action.TAKE_OVER, "its engine goes on"
    return Action.TAKE_OVER, "it does not run; its next start goes by it"


def changed_keys(old: BaseModel, new: BaseModel, path: str = "") -> Iterator[str]:
    """The keys whose values differ, as they are written: ``daemon.bind``; a list counts as one key. Pools are none of them."""
    for name in type(old).model_fields:
        before: Any = getattr(old, name)
        after: Any = getattr(new, name)
        key = f"{path}{name}"
        if key in ("pools", "base_dir"):
            continue
        if isinstance(before, BaseModel) and type(after) is type(before):
            yield from changed_keys(before, after, f"{key}.")
        elif before != after:
            yield key


def with_sections(old: Config, new: Config) -> Config:
    """``old`` with all of ``new`` that a running daemon takes over, but for the pools."""
    taken: dict[str, Any] = {name: getattr(new, name) for name in _WHOLE}
    for section, key in _SINGLE:
        before = taken.get(section, getattr(old, section))
        taken[section] = before.model_copy(update={key: getattr(getattr(new, section), key)})
    return old.model_copy(update=taken)


def with_pool(config: Config, pool: PoolConfig) -> Config:
    """``config`` with ``pool`` in the place of what it said of that pool."""
    known = any(one.id == pool.id for one in config.pools)
    pools = tuple(pool if one.id == pool.id else one for one in config.pools)
    return config.model_copy(update={"pools": pools if known else (*pools, pool)})


def without_pool(config: Config, pool_id: str) -> Config:
    """``config`` as if it did not name that pool."""
    return config.model_copy(update={"pools": tuple(one for one in config.pools if one.id != pool_id)})
