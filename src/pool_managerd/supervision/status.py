"""What a pool looks like to people and machines (DESIGN §7)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pool_managerd.core.artifacts import ENGINE_MODES
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.narration import size
from pool_managerd.core.redaction import masked_argv, masked_env, masked_text
from pool_managerd.core.registry import PoolEntry, Registry
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.driver import PoolDriver
from pool_managerd.supervision.protocols import Clock
from pool_managerd.supervision.services import Services

if TYPE_CHECKING:
    from pool_managerd.core.preflight import Report


def status_of(driver: PoolDriver, registry: Registry, profile: str, now: float, wall_ms: int) -> dict[str, Any]:
    """Every field of the public status, absent facts as None."""
    i, seen, entry = driver.instance, view(driver.instance), registry.get(driver.pool_id)
    prepared, process, launch = driver.launch.prepared, driver.launch.process, driver.launch
    if entry is None:
        raise LookupError(driver.pool_id)
    on_cpu = profile == "dev" and prepared is not None and prepared.attach_url is None and launch.assignment is None
    return {
        "pool_id": i.pool_id, "state": seen.state, "live": seen.live, "ready": seen.ready, "draining": seen.draining,
        "active_leases": entry.active_leases, "slots_total": entry.slots_total, "slots_free": entry.slots_free,
        "engine": entry.engine, "engine_version": entry.engine_version, "engine_digest": entry.engine_digest,
        "model_id": entry.model_id, "model_ref": entry.model_ref, "model_path": prepared.model_path if prepared else None,
        "device_mask": entry.device_mask, "ctx_max": entry.ctx_max, "replica_id": i.replica_id, "epoch": i.epoch,
        "phase": i.phase.value, "reason": i.reason, "last_error": i.last_error,
        "crash_count": i.crash_count, "restart_count": i.restart_count, "circuit_state": entry.circuit_state,
        "held": i.held, "drained": i.drained, "quarantined": i.quarantined, "hung": i.hung,
        "last_heartbeat_ms": entry.last_heartbeat_ms,
        "last_probe_age_ms": None if i.last_good_at is None else round((now - i.last_good_at) * 1000),
        "pid": process.pid if process and i.has_process else None,
        "last_probe": i.probe_reason or None,
        "url": masked_text(prepared.url) if prepared and (seen.live or prepared.attach_url) else None,
        "isolation": process.isolation if process and i.has_process else None,
        "compute": "cpu" if on_cpu else "gpu" if launch.assignment is not None else None,
        "uptime_ms": round((now - i.started_at) * 1000) if i.has_process and i.started_at is not None else None,
        "next_restart_at_ms": wall_ms + round((i.deadline - now) * 1000) if i.phase is Phase.BACKOFF and i.deadline else None,
        "preload": _preload(driver, now, wall_ms),
        "perf": None if launch.first_token_ms is None else {
            "first_token_ms": round(launch.first_token_ms, 1), "tokens_per_s": round(launch.tokens_per_s or 0, 2)},
        "devices": [asdict(share) for share in entry.devices], "vram_available_bytes": entry.vram_available_bytes,
        "vram_total_bytes": entry.vram_total_bytes, "vram_free_bytes": entry.vram_free_bytes,
        "profile": profile, "configured": driver.config is not None,
    }  # fmt: skip


def _preload(driver: PoolDriver, now: float, wall_ms: int) -> dict[str, Any] | None:
    """How far a start has come, while one is under way."""
    i, launch = driver.instance, driver.launch
    attaching = i.phase is Phase.ATTACHED and i.last_good_at is None
    if i.launched_at is None or not (attaching or i.phase in (Phase.STAGING, Phase.STARTING, Phase.WARMING)):
        return None
    done, total = launch.progress
    words = {
        "queue": "Waiting for other pools to load first", "memory": "Looking for room on the GPUs",
        "model": "Verifying the model file", "engine": "Preparing the engine",
        "starting": "The engine is loading its model", "warm-up": "The engine answers its first prompt",
        "attach": "Nobody healthy answers at the engine's URL yet; it is asked again and again",
    }  # fmt: skip
    elapsed_ms = round((now - i.launched_at) * 1000)
    return {
        "started_at_ms": wall_ms - elapsed_ms, "elapsed_ms": elapsed_ms,
        "step": launch.step, "human": words.get(launch.step, "Starting"),
        "bytes_done": done, "bytes_total": total, "last_probe": i.probe_reason or None,
    }  # fmt: skip


def health_of(status: Mapping[str, Any]) -> dict[str, Any]:
    """The short form of a status, for whoever polls health."""
    figures = ("active_leases", "slots_total", "slots_free", "crash_count", "restart_count", "perf", "last_probe_age_ms")
    head = ("pool_id", "live", "ready", "draining", "state", "last_error")
    return {**{name: status[name] for name in head}, "metrics": {name: status[name] for name in figures}}


def lease_rows(entry: PoolEntry | None, clock: Clock) -> list[dict[str, Any]]:
    """The leases that have an id, oldest first; their ends on the wall clock, for people."""
    shift_ms = clock.wall_ms() - clock.monotonic() * 1000
    return [
        {
            "lease_id": lease.lease_id, "holder": lease.holder, "given_at_ms": lease.given_at_ms,
            "expires_at_ms": None if lease.expires_at is None else round(lease.expires_at * 1000 + shift_ms),
        }
        for lease in (entry.leases.values() if entry else ())
    ]  # fmt: skip


def command_of(driver: PoolDriver) -> dict[str, Any]:
    """The exact argv and environment, secrets masked. Raises RequestError until the engine was prepared once."""
    prepared = driver.launch.prepared
    if prepared is None:
        raise RequestError(
            f"cannot show the command of pool {driver.pool_id}: its engine was not prepared yet",
            code="POOL_UNREADY", status=409, pool_id=driver.pool_id, hint="start the pool once",
        )  # fmt: skip
    redact = driver.redactor.text
    argv = [] if prepared.attach_url is not None else [redact(word) for word in masked_argv(prepared.argv)]
    env = {name: redact(value) for name, value in masked_env(prepared.env).items()}
    url = prepared.attach_url and masked_text(prepared.attach_url)
    return {"pool_id": driver.pool_id, "argv": argv, "env": env, "attached_to": url}


def capabilities_of(version: str, profile: str, statuses: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("pool_id", "engine", "engine_version", "model_id", "ctx_max", "slots_total", "ready")
    return {
        "api_version": "2.0.0", "version": version, "profile": profile,
        "compute": "cpu allowed (profile dev)" if profile == "dev" else "gpu only",
        "model_schemes": ["file"], "engines": {engine: list(modes) for engine, modes in ENGINE_MODES.items()},
        "pools": [{key: status[key] for key in keys} for status in statuses],
    }  # fmt: skip


async def explanation(driver: PoolDriver, steps: list[Any], s: Services) -> dict[str, Any]:
    """What a start would do now, where it would be placed, and what stands in its way."""
    i = driver.instance
    problems = [_problem("it is held", f"pool-managerd release {driver.pool_id}")] if i.held else []
    idle = i.phase in (Phase.DOWN, Phase.FAILED, Phase.BACKOFF, Phase.OPEN)
    trying = idle or i.phase is Phase.STAGING  # which a start that is refused passes through again and again
    if not driver.external and trying and (driver.config is not None or driver.submitted is not None):
        asks: tuple[Callable[[], Awaitable[Any]], ...] = (
            lambda: s.preflight(driver.pool_id),
            lambda: s.admission.forecast(driver),
        )
        for ask in asks:
            try:
                answer = await ask()
            except PoolError as problem:
                problems.append(_problem(problem.message, problem.hint, problem.code))
            else:
                steps = [*steps, *_placing(answer)]
    elif not idle:
        steps = [*steps, *_promised(driver)]
    told = {problem["message"] for problem in problems}
    problems += [_problem(step["detail"]) for step in steps if step["kind"] == "refused" and step["detail"] not in told]
    blockers = [problem["message"] for problem in problems]
    would = f"Pool '{driver.pool_id}' would start"
    if blockers:
        would = f"Pool '{driver.pool_id}' would not start: {'; '.join(blockers)}"
    elif not idle:
        would = f"Pool '{driver.pool_id}' is {view(i).state} already; nothing would be done"
    return driver.redactor.mapping(
        {"pool_id": driver.pool_id, "would": would, "steps": steps, "blockers": blockers, "problems": problems}
    )


def _problem(message: str, hint: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "hint": hint, "code": code}


def _placing(answer: Report | tuple[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return _memory_steps(*answer) if isinstance(answer, tuple) else []


def _promised(driver: PoolDriver) -> list[dict[str, str]]:
    """What the running engine was promised, and by which sum."""
    found, sizing = driver.launch.assignment, driver.launch.sizing
    if found is None or sizing is None:
        return []
    parts = (f"{size(found.bytes_by_device[d.uuid])} reserved on GPU {d.label} ({d.name})" for d in found.devices)
    return _memory_steps(" and ".join(parts), sizing.estimate_on(found.devices, found.shares).explain())


def _memory_steps(where: str, parts: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"kind": "memory", "detail": where}, *({"kind": "needs", "detail": part} for part in parts)]
