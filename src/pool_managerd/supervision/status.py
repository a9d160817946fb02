"""A pool's status, as the API, the CLI and the library show it (DESIGN §7)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pool_managerd.config import Config
from pool_managerd.core.artifacts import NOT_FETCHED, AttachedEngine, PreparedEngine
from pool_managerd.core.baselines import Baseline
from pool_managerd.core.crash_report import CrashReport
from pool_managerd.core.engines import ENGINES
from pool_managerd.core.lifecycle import Desired, Phase, view
from pool_managerd.core.lifecycle.phase import IDLE, LOADING, WAITING
from pool_managerd.core.narration import duration, size
from pool_managerd.core.preflight import Report
from pool_managerd.core.redaction import Redactor, masked_argv, masked_env, masked_text
from pool_managerd.core.registry import Lease, Registry
from pool_managerd.core.restart_limit import within
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.fetching import eta_s
from pool_managerd.supervision.foresight import foreseen_of
from pool_managerd.supervision.in_flight import in_hand
from pool_managerd.supervision.policy import check_startable
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Clock
from pool_managerd.supervision.services import Services


def status_of(
    pool: Pool, registry: Registry, profile: str, now: float, wall_ms: int, crash: CrashReport | None = None
) -> dict[str, Any]:  # fmt: skip
    """Every field of the public status, absent facts as None."""
    state, i, launch = pool.state, pool.instance, pool.launch
    seen, entry, prepared, process = view(state), registry.get(pool.pool_id), launch.prepared, launch.process
    if entry is None:
        raise LookupError(pool.pool_id)
    on_cpu = profile == "dev" and isinstance(prepared, PreparedEngine) and launch.allocation is None
    return {
        "pool_id": pool.pool_id, "state": seen.state, "live": seen.live, "ready": seen.ready, "draining": seen.draining,
        "active_leases": entry.active_leases, "slots_total": entry.slots_total, "slots_free": entry.slots_free,
        "engine": entry.engine, "engine_version": entry.engine_version, "engine_digest": entry.engine_digest,
        "model_id": entry.model_id, "model_ref": entry.model_ref, "model_path": prepared.model_path if prepared else None,
        "device_mask": entry.device_mask, "ctx_max": entry.ctx_max, "replica_id": pool.instance_id.replica_id, "epoch": i.epoch,
        "phase": i.phase.value, "reason": state.reason, "last_error": state.last_error,
        "crash_count": state.crash_count, "restart_count": state.restart_count, "circuit_state": entry.circuit_state,
        "circuits": {name: b.circuit.value for name, b in state.history.breakers.items()},
        "restart_rate": len(within(state.history.restarts, now, pool.definition.policy.restart_limit.window_ms)),
        "last_crash": None if crash is None else {key: value for key, value in crash.to_json().items() if key != "log_tail"},
        "desired": state.desired.value, "drained": state.desired is Desired.DRAINED and not seen.draining, "held": state.held,
        "quarantined": state.quarantined, "hung": i.hung,
        "activity": {"verdict": launch.activity.verdict.value, "why": launch.activity.why or None} if i.has_process else None,
        "outdated": list(launch.outdated) if i.has_process else [],
        "last_heartbeat_ms": entry.last_heartbeat_ms,
        "last_probe_age_ms": None if i.last_good_at is None else round((now - i.last_good_at) * 1000),
        "pid": process.pid if process and i.has_process else None,
        "last_probe": i.probe_reason or None,
        "url": masked_text(prepared.url) if prepared and (seen.live or isinstance(prepared, AttachedEngine)) else None,
        "isolation": process.isolation if process and i.has_process else None,
        "compute": "cpu" if on_cpu else "gpu" if launch.allocation is not None else None,
        "uptime_ms": round((now - i.started_at) * 1000) if i.has_process and i.started_at is not None else None,
        "next_restart_at_ms": wall_ms + round((i.deadline - now) * 1000) if i.phase in WAITING and i.deadline else None,
        "preload": _preload(pool, now, wall_ms), "drain": _drain(pool, registry, now),
        "perf": _perf(launch.measured), "baselines": [baseline.to_dict() for baseline in launch.measured],
        "cache": _cache(pool),
        "devices": [asdict(share) for share in entry.devices], "vram_available_bytes": entry.vram_available_bytes,
        "vram_total_bytes": entry.vram_total_bytes, "vram_free_bytes": entry.vram_free_bytes,
        "profile": profile, "configured": pool.config is not None,
    }  # fmt: skip


def _drain(pool: Pool, registry: Registry, now: float) -> dict[str, Any] | None:
    """What a drain still waits for, and until when at the latest; None while there is none."""
    i = pool.instance
    if i.phase is not Phase.DRAINING or i.deadline is None:
        return None
    left_ms = max(0, round((i.deadline - now) * 1000))
    return {"left": in_hand(pool, registry), "requests": pool.launch.requests, "remaining_ms": left_ms}


def _perf(measured: Sequence[Baseline]) -> dict[str, Any] | None:
    """What tells most of how fast it is, and what that rests on."""
    found = measured[0].to_dict() if measured else {}
    keys = ("first_token_ms", "tokens_per_s", "measured_with", "measured_at_ms")
    return {key: found[key] for key in keys} if found else None


def beside(other: Pool | None, registry: Registry) -> dict[str, Any] | None:
    """The other engine of a pool that has two: one that is tried, or one that has been replaced and ends with its leases."""
    if other is None:
        return None
    i, prepared, process = other.instance, other.launch.prepared, other.launch.process
    return {
        "replica_id": other.instance_id.replica_id, "role": other.role.value, "state": view(other.state).state, "epoch": i.epoch,
        "active_leases": registry.leases_on(other.pool_id, i.epoch), "pid": process.pid if process and i.has_process else None,
        "url": masked_text(prepared.url) if prepared and i.has_process else None,
    }  # fmt: skip


def _cache(pool: Pool) -> dict[str, Any] | None:
    """What this launch was given back of what its slots held before; None for an engine that keeps nothing. Of one that an
    earlier daemon has launched nobody knows it.
    """
    found = pool.launch.restored
    if not pool.instance.keeps_slots:
        return None
    if found is None:
        return {"restored_slots": None, "restored_tokens": None, "lost": None}
    return {"restored_slots": found.slots, "restored_tokens": found.tokens, "lost": found.lost or None}


def _preload(pool: Pool, now: float, wall_ms: int) -> dict[str, Any] | None:
    """How far a start has come, while one is under way."""
    i, launch = pool.instance, pool.launch
    attaching = i.phase is Phase.ATTACHED and i.last_good_at is None
    if i.launched_at is None or not (attaching or i.phase in LOADING):
        return None
    done, total = launch.progress
    left_s = eta_s(done, total, launch.rate)
    words = {
        "queue": "Waiting for other pools to load first", "memory": "Looking for room on the GPUs",
        "look": "Asking where its model is", "fetch": "Fetching the model", "unpack": "Unpacking the model",
        "model": "Verifying the model file", "engine": "Preparing the engine",
        "starting": "The engine is loading its model", "warm-up": "The engine answers its first prompt",
        "restore": "The engine is given back what it had read",
        "attach": "Nobody healthy answers at the engine's URL yet; it is asked again and again",
    }  # fmt: skip
    elapsed_ms = round((now - i.launched_at) * 1000)
    return {
        "started_at_ms": wall_ms - elapsed_ms, "elapsed_ms": elapsed_ms,
        "step": launch.step, "human": words.get(launch.step, "Starting"),
        "bytes_done": done, "bytes_total": total, "bytes_per_s": round(launch.rate) or None,
        "eta_ms": None if left_s is None else round(left_s * 1000), "last_probe": i.probe_reason or None,
    }  # fmt: skip


def health_of(status: Mapping[str, Any]) -> dict[str, Any]:
    """The short form of a status, for whoever polls health."""
    metrics = ("active_leases", "slots_total", "slots_free", "crash_count", "restart_count", "perf", "last_probe_age_ms")
    head = ("pool_id", "live", "ready", "draining", "state", "last_error")
    return {**{name: status[name] for name in head}, "metrics": {name: status[name] for name in metrics}}


def lease_rows(leases: Iterable[Lease], clock: Clock) -> list[dict[str, Any]]:
    """The leases that have an id, oldest first; their ends on the wall clock."""
    shift_ms = clock.wall_ms() - clock.monotonic() * 1000
    return [
        {
            "lease_id": lease.lease_id, "holder": lease.holder, "given_at_ms": lease.given_at_ms,
            "expires_at_ms": None if lease.expires_at is None else round(lease.expires_at * 1000 + shift_ms),
        }
        for lease in leases
    ]  # fmt: skip


def command_of(pool: Pool, redactor: Redactor) -> dict[str, Any]:
    """The exact argv and environment, secrets masked. Raises RequestError until the engine was prepared once."""
    prepared = pool.launch.prepared
    if prepared is None:
        raise RequestError(
            f"cannot show the command of pool {pool.pool_id}: its engine was not prepared yet",
            code="POOL_UNREADY", status=409, pool_id=pool.pool_id, hint="start the pool once",
        )  # fmt: skip
    if isinstance(prepared, AttachedEngine):
        return {"pool_id": pool.pool_id, "argv": [], "env": {}, "attached_to": masked_text(prepared.url)}
    argv = [redactor.text(word) for word in masked_argv(prepared.argv)]
    env = {name: redactor.text(value) for name, value in masked_env(prepared.env).items()}
    return {"pool_id": pool.pool_id, "argv": argv, "env": env, "attached_to": None}


def capabilities_of(version: str, profile: str, statuses: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("pool_id", "engine", "engine_version", "model_id", "ctx_max", "slots_total", "ready")
    return {
        "api_version": "2.0.0", "version": version, "profile": profile,
        "compute": "cpu allowed (profile dev)" if profile == "dev" else "gpu only",
        "model_schemes": ["file", "hf", "https", "http"], "engines": {name: list(kind.modes) for name, kind in ENGINES.items()},
        "pools": [{key: status[key] for key in keys} for status in statuses],
    }  # fmt: skip


async def explanation(pool: Pool, config: Config, steps: list[Any], s: Services) -> dict[str, Any]:
    """What a start would do now, where it would be placed, and what stands in its way."""
    i = pool.instance
    problems = [_problem("it is held", f"pool-managerd release {pool.pool_id}")] if pool.state.held else []
    if pool.state.desired.stays_down:
        how = f"it was {pool.state.desired.value} by request: demand does not start it, a start does"
        steps = [{"kind": "desired", "detail": how}, *steps]
    until, now = pool.state.history.open_until, s.clock.monotonic()
    if until is not None and now < until:
        how = f"its circuit breaker is open for {duration(until - now)}: a start by hand is tried all the same, once"
        steps = [{"kind": "breaker", "detail": how}, *steps]
    try:
        if i.phase in IDLE:
            check_startable(config, pool)
    except PoolError as problem:
        problems.append(_problem(problem.message, problem.hint, problem.code))
    idle = i.phase in IDLE
    trying = idle or i.phase is Phase.STAGING  # which a start that is refused passes through again and again
    if not pool.definition.external and trying and (pool.config is not None or pool.submitted is not None):
        fetch, denied = await foreseen_of(pool, s)
        steps = steps if fetch is None else [*steps, fetch]
        problems += [] if denied is None else [_problem(denied.message, denied.hint, denied.code)]
        asks: tuple[Callable[[], Awaitable[Any]], ...] = (
            lambda: s.preflight(pool.pool_id),
            lambda: s.admission.forecast(pool),
        )
        for ask in asks:
            try:
                steps = [*steps, *_placing(await ask())]
            except PoolError as problem:
                if problem.code != NOT_FETCHED and (denied is None or problem.code != denied.code):  # which is said already
                    problems.append(_problem(problem.message, problem.hint, problem.code))
    elif not idle:
        steps = [*steps, *_reserved(pool)]
    told = {problem["message"] for problem in problems}
    problems += [_problem(step["detail"]) for step in steps if step["kind"] == "refused" and step["detail"] not in told]
    blockers = [problem["message"] for problem in problems]
    would = f"Pool '{pool.pool_id}' would start"
    if blockers:
        would = f"Pool '{pool.pool_id}' would not start: {'; '.join(blockers)}"
    elif not idle:
        would = f"Pool '{pool.pool_id}' is {view(pool.state).state} already; nothing would be done"
    return s.events.redactor.mapping(
        {"pool_id": pool.pool_id, "would": would, "steps": steps, "blockers": blockers, "problems": problems}
    )


def _problem(message: str, hint: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "hint": hint, "code": code}


def _placing(answer: Report | tuple[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return _memory_steps(*answer) if isinstance(answer, tuple) else []


def _reserved(pool: Pool) -> list[dict[str, str]]:
    """What was reserved for the running engine, and by which sum."""
    found, sizing = pool.launch.allocation, pool.launch.sizing
    if found is None or sizing is None:
        return []
    parts = (f"{size(found.bytes_by_device[d.uuid])} reserved on GPU {d.label} ({d.name})" for d in found.devices)
    return _memory_steps(" and ".join(parts), sizing.estimate_on(found.devices, found.shares).explain())


def _memory_steps(where: str, parts: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"kind": "memory", "detail": where}, *({"kind": "needs", "detail": part} for part in parts)]
