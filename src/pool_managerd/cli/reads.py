"""Commands that ask and show."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import typer

from pool_managerd.cli.exits import NO, OK
from pool_managerd.cli.options import ConfigFile, OptionalPoolId, Output, PoolId, Url, daemon
from pool_managerd.cli.output import Format, facts, moment, show, table

Json = dict[str, Any]


def pools(url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the pools."""
    columns = ("ID", "STATE", "READY", "ENGINE", "MODEL", "LEASES", "RESTARTS", "PID", "URL", "LAST ERROR")

    def rows(found: list[Json]) -> None:
        table(
            columns,
            (
                (
                    pool["pool_id"],
                    pool["state"],
                    pool["ready"],
                    pool.get("engine"),
                    pool.get("model_id"),
                    f"{pool['active_leases']}/{pool['slots_total']}"
                    if pool.get("slots_total") is not None
                    else pool["active_leases"],
                    pool.get("restart_count"),
                    pool.get("pid"),
                    pool.get("url"),
                    _short(pool.get("last_error")),
                )
                for pool in found
            ),
            empty="no pools",
        )

    show(daemon(url, config).get("pools"), output, rows)


def status(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Show one pool. Exits 0 when it is ready, 1 when it is not."""
    found: Json = daemon(url, config).get("pools", pool_id, "status")
    show(found, output, _status_facts)
    raise typer.Exit(OK if found.get("ready") else NO)


def command(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Show the exact argv and environment of a pool's engine, secrets masked."""

    def lines(found: Json) -> None:
        for name, value in found.get("env", {}).items():
            sys.stdout.write(f"{name}={shlex.quote(value)} \\\n")
        sys.stdout.write(shlex.join(found["argv"]) + "\n" if found["argv"] else f"attached to {found.get('attached_to')}\n")

    show(daemon(url, config).get("pools", pool_id, "command"), output, lines)


def leases(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the leases that a pool's slots are held by."""
    columns = ("LEASE", "HOLDER", "GIVEN", "ENDS")

    def rows(found: list[Json]) -> None:
        cells = ((e["lease_id"], e.get("holder"), moment(e.get("given_at_ms")), moment(e.get("expires_at_ms"))) for e in found)
        table(columns, cells, empty="no leases")

    show(daemon(url, config).get("pools", pool_id, "leases"), output, rows)


def crashes(pool_id: OptionalPoolId = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the crashes of engines: what happened, and the evidence."""
    path = ("crashes",) if pool_id is None else ("pools", pool_id, "crashes")

    def rows(found: list[Json]) -> None:
        columns = ("WHEN", "POOL", "EXIT", "AFTER S", "CLASS", "WHAT")
        cells = (
            (
                moment(crash.get("ts_ms")),
                crash.get("pool_id"),
                crash.get("exit_code") if crash.get("signal") is None else f"signal {crash['signal']}",
                crash.get("uptime_seconds"),
                crash.get("crash_class"),
                _short(crash.get("last_error") or crash.get("human")),
            )
            for crash in found
        )
        table(columns, cells, empty="no crashes")

    show(daemon(url, config).get(*path), output, rows)


def _status_facts(pool: Json) -> None:
    preload, perf = pool.get("preload") or {}, pool.get("perf") or {}
    reason = f" ({pool['reason']})" if pool.get("reason") else ""
    speed = f"{perf['tokens_per_s']} tokens/s, first token after {perf['first_token_ms']} ms" if perf else None
    facts(
        (
            ("pool", pool["pool_id"]),
            ("state", f"{pool['state']}{reason}"),
            ("ready", pool["ready"]),
            ("doing", preload.get("human")),
            ("engine", f"{pool.get('engine')} {pool.get('engine_version') or ''}".strip() if pool.get("engine") else None),
            ("model", pool.get("model_id")),
            ("leases", _slots(pool)),
            ("devices", pool.get("device_mask")),
            ("runs on", _runs_on(pool)),
            ("pid", pool.get("pid")),
            ("url", pool.get("url")),
            ("speed", speed),
            ("isolation", pool.get("isolation")),
            ("crashes", pool.get("crash_count")),
            ("restarts", pool.get("restart_count")),
            ("circuit", pool.get("circuit_state")),
            ("held", pool.get("held") or None),
            ("drained", pool.get("drained") or None),
            ("next restart", moment(pool.get("next_restart_at_ms"))),
            ("last error", pool.get("last_error")),
        )
    )


def _runs_on(pool: Json) -> str | None:
    """``GPU 0, GPU 1``, or the CPU where that is allowed; nothing while no engine runs."""
    if not pool.get("live"):
        return None
    if pool.get("compute") == "gpu":
        return ", ".join(f"GPU {device['device']}" for device in pool.get("devices", []))
    return "the CPU" if pool.get("compute") == "cpu" else None


def _slots(pool: Json) -> str:
    total = pool.get("slots_total")
    return f"{pool['active_leases']} of {total}" if total else str(pool["active_leases"])


def _short(text: Any, limit: int = 100) -> str | None:
    if not text:
        return None
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
