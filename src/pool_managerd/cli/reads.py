"""Commands that ask and show."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from pool_managerd.cli import completion
from pool_managerd.cli.exits import NO, OK, UNREACHABLE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, PoolId, PoolIds, Url, chosen, daemon
from pool_managerd.cli.output import Format, Json, error, moment, show
from pool_managerd.cli.table import Column, facts, table
from pool_managerd.core.narration import count, duration, size

OperationId = Annotated[
    str | None,
    typer.Argument(metavar="[ID]", help="The operation's id.", show_default=False, autocompletion=completion.operation_ids),
]


def pools(url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the pools (also: ps, ls)."""
    wide = output is Format.WIDE

    def rows(found: list[Json]) -> None:
        table(_POOLS, (_pool_row(pool, wide) for pool in found), empty="no pools", wide=wide)

    show(daemon(url, config).get("pools"), output, rows)


# In the order of their ranks columns give way when the terminal is narrow: the id stays, the engine goes first. A pool that
# serves has a URL and one that does not has an error, so these two share a column, one below the other where there are both;
# a second engine of the pool comes below them, and how far a reload is below the state.
_POOLS = (
    Column("ID", 0, least=7, middle=True), Column("STATE", 1), Column("READY", 3), Column("LEASES", 4), Column("RESTARTS", 6),
    Column("MODEL", 5, least=8, middle=True), Column("ENGINE", 9, wide=True), Column("DEVICES", 9, wide=True),
    Column("PID", 8, wide=True), Column("URL / LAST ERROR", 2, least=21),
)  # fmt: skip


def _pool_row(pool: Json, wide: bool) -> tuple[Any, ...]:
    total, url, problem = pool.get("slots_total"), pool.get("url"), pool.get("last_error")
    leases = pool["active_leases"] if total is None else f"{pool['active_leases']}/{total}"
    model = pool.get("model_id") if wide else model_name(pool.get("model_id"))
    where = [text for text in (url, problem, _beside(pool) if wide else _beside_in_short(pool)) if text]
    state = [pool["state"], f"reload: {pool['reload']}"] if pool.get("reload") else pool["state"]
    return (
        pool["pool_id"], state, pool["ready"], leases, pool.get("restart_count"), model, pool.get("engine"),
        pool.get("device_mask"), pool.get("pid"), where or None,
    )  # fmt: skip


def model_name(model: Any) -> str | None:
    """What tells a model from others at a glance: its file's name."""
    return str(model).rstrip("/").rpartition("/")[2].removeprefix("file:") if model else None


def status(ids: PoolIds = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Show pools in full; exits 1 when one is not ready."""
    node = daemon(url, config)
    wanted = chosen(node, ids, False, default_all=True)
    found: list[Json] = []
    missing: list[CommandFailed] = []
    for pool_id in wanted:
        try:
            found.append(node.get("pools", pool_id, "status"))
        except CommandFailed as failure:
            if len(wanted) == 1 or failure.exit_code == UNREACHABLE:
                raise
            missing.append(failure)

    def blocks(_: Any) -> None:
        for number, pool in enumerate(found):
            sys.stdout.write("\n" if number else "")
            _status_facts(pool)
        if not found:
            sys.stdout.write("no pools\n")

    show(found[0] if ids and len(wanted) == 1 else found, output, blocks)
    for other in missing[:-1]:
        error(other.message, other.hint)
    if missing:
        raise missing[-1]
    raise typer.Exit(OK if all(pool.get("ready") for pool in found) else NO)


def operations(
    operation_id: OperationId = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE
) -> None:
    """List changes, running and recent, or show one."""
    columns = (
        Column("OPERATION", 0), Column("KIND", 2), Column("POOL", 1, least=7, middle=True), Column("STATUS", 1),
        Column("BEGAN", 5), Column("TOOK", 4), Column("ERROR", 3, least=12),
    )  # fmt: skip
    node = daemon(url, config)

    def rows(found: list[Json]) -> None:
        cells = (
            (op["operation_id"], str(op["kind"]).replace("_", " "), op["pool_id"], op["status"], moment(op.get("started_at_ms")),
             _took(op), (op.get("error") or {}).get("message"))
            for op in found
        )  # fmt: skip
        table(columns, cells, empty="no operations", wide=output is Format.WIDE)

    if operation_id is None:
        show(node.get("operations"), output, rows)
        return
    found: Json = node.get("operations", operation_id)
    show(found, output, _operation_facts)
    raise typer.Exit(NO if found.get("status") == "failed" else OK)


def _operation_facts(op: Json) -> None:
    failure = op.get("error") or {}
    hint = failure.get("hint") or ""
    outcome = [(name.replace("_", " "), value) for name, value in (op.get("outcome") or {}).items() if name != "pool_id"]
    facts(
        (
            ("operation", op["operation_id"]),
            ("kind", str(op["kind"]).replace("_", " ")),
            ("pool", op["pool_id"]),
            ("status", op["status"]),
            ("began", moment(op.get("started_at_ms"))),
            ("took", _took(op)),
            *outcome,
            ("error", failure.get("message")),
            ("hint", hint if hint and hint not in str(failure.get("message")) else None),
        )
    )


def _took(op: Json) -> str | None:
    began, ended = op.get("started_at_ms"), op.get("ended_at_ms")
    return duration((ended - began) / 1000) if began is not None and ended is not None else None


def command(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Show an engine's exact argv and environment.

    Secrets are masked.
    """

    def lines(found: Json) -> None:
        for name, value in found.get("env", {}).items():
            sys.stdout.write(f"{name}={shlex.quote(value)} \\\n")
        sys.stdout.write(shlex.join(found["argv"]) + "\n" if found["argv"] else f"attached to {found.get('attached_to')}\n")

    show(daemon(url, config).get("pools", pool_id, "command"), output, lines)


def leases(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the leases that hold a pool's slots."""
    columns = (Column("LEASE", 0), Column("HOLDER", 1, least=8, middle=True), Column("GIVEN", 3), Column("ENDS", 2))

    def rows(found: list[Json]) -> None:
        cells = ((e["lease_id"], e.get("holder"), moment(e.get("given_at_ms")), moment(e.get("expires_at_ms"))) for e in found)
        table(columns, cells, empty="no leases", wide=output is Format.WIDE)

    show(daemon(url, config).get("pools", pool_id, "leases"), output, rows)


def _so_far(preload: Json) -> str | None:
    """How much of the model was fetched or verified, how fast, and how long it takes yet."""
    done, total, rate, left_ms = (preload.get(key) for key in ("bytes_done", "bytes_total", "bytes_per_s", "eta_ms"))
    if not done or not total:
        return None
    pace = f", {size(rate)} a second" if rate else ""
    return f"{size(done)} of {size(total)}{pace}{f', {duration(left_ms / 1000)} left' if left_ms else ''}"


def _status_facts(pool: Json) -> None:
    preload = pool.get("preload") or {}
    reason = f" ({pool['reason']})" if pool.get("reason") else ""
    facts(
        (
            ("pool", pool["pool_id"]),
            ("state", f"{pool['state']}{reason}"),
            ("ready", pool["ready"]),
            ("doing", preload.get("human") or _activity(pool)),
            ("so far", _so_far(preload)),
            ("engine", f"{pool.get('engine')} {pool.get('engine_version') or ''}".strip() if pool.get("engine") else None),
            ("model", pool.get("model_id")),
            ("leases", _slots(pool)),
            ("devices", pool.get("device_mask")),
            ("runs on", _runs_on(pool)),
            ("pid", pool.get("pid")),
            ("url", pool.get("url")),
            *((str(baseline["kind"]), _measured(baseline)) for baseline in pool.get("baselines") or ()),
            ("reload", pool.get("reload")),
            ("beside it", _beside(pool)),
            ("drain", _drain(pool)),
            ("reloaded", _reloaded(pool)),
            ("given back", _given_back(pool)),
            ("cache lost", (pool.get("cache") or {}).get("lost")),
            ("outdated", "; ".join(pool.get("outdated") or ()) or None),
            ("not applied", pool.get("unapplied")),
            ("isolation", pool.get("isolation")),
            ("crashes", pool.get("crash_count")),
            ("last crash", _last_crash(pool)),
            ("restarts", pool.get("restart_count")),
            ("circuit", pool.get("circuit_state")),
            ("held", f"nothing starts by itself; pool-managerd release {pool['pool_id']}" if pool.get("held") else None),
            ("desired", _desired(pool)),
            ("next restart", moment(pool.get("next_restart_at_ms"))),
            ("last error", pool.get("last_error")),
        )
    )


def _measured(baseline: Json) -> str:
    """What was measured, with what, and when."""
    when = moment(baseline.get("measured_at_ms"))
    rest = f"{baseline['measured_with']}{f', {when}' if when else ''}"
    return f"first token after {baseline['first_token_ms']:.0f} ms, {baseline['tokens_per_s']:.1f} tokens/s ({rest})"


def _last_crash(pool: Json) -> str | None:
    """When, what, and where to read on; nothing while it is ready: then it is over."""
    crash = pool.get("last_crash")
    if not crash or pool.get("ready"):
        return None
    what, remedy = crash.get("crash_class"), (crash.get("remediation") or {}).get("sentence")
    return f"{moment(crash.get('ts_ms'))}, {what}: {remedy} (pool-managerd crashes {pool['pool_id']})"


def _drain(pool: Json) -> str | None:
    """What it waits for, until when, and what calls it off."""
    drain = pool.get("drain")
    if not drain:
        return None
    left = f"{count(drain['left'], 'request')} left, {duration(drain['remaining_ms'] / 1000)} to the deadline"
    return f"{left}; pool-managerd undrain {pool['pool_id']} calls it off"


def _reloaded(pool: Json) -> str | None:
    """What is not as the file says."""
    keys = pool.get("reloaded")
    back = f"pool-managerd reload {pool['pool_id']} --reset goes back to the file"
    return f"{', '.join(keys)}, by hand; {back}" if keys else None


def _given_back(pool: Json) -> str | None:
    """What its slots held before its last stop, as far as the engine has it again."""
    cache = pool.get("cache")
    if not cache or not pool.get("ready"):
        return None
    if cache["restored_slots"] is None:
        return "not known since the daemon was started again"
    return f"{count(cache['restored_slots'], 'slot')}, {cache['restored_tokens']} tokens" if cache["restored_slots"] else None


def _beside(pool: Json) -> str | None:
    """The pool's other engine, while one takes the other's place."""
    other = pool.get("beside")
    if not other:
        return None
    where = f", pid {other['pid']}, {other['url']}" if other.get("pid") else ""
    return f"{other['role']} {other['replica_id']}, {other['state']}{where}, leases: {other['active_leases']}"


def _beside_in_short(pool: Json) -> str | None:
    other = pool.get("beside")
    return f"{other['role']}: {other['state']}" if other else None


def _activity(pool: Json) -> str | None:
    """What its engine was seen to do, where that is more than to wait for requests."""
    seen = pool.get("activity") or {}
    return f"{seen['verdict']}: it {seen['why']}" if seen.get("why") and seen["verdict"] != "idle" else None


def _desired(pool: Json) -> str | None:
    """What was asked for last, where that is not to run, and what brings it up."""
    desired, start = pool.get("desired"), f"pool-managerd start {pool['pool_id']}"
    sleeps = pool.get("state") == "sleeping"
    words = {
        "stopped": f"stopped by request; {start}", "drained": f"drained by request; {start}",
        "evicted": "asleep for now; it wakes on demand" if sleeps else "stopped for now; it starts on demand",
        "on_demand": "nothing yet; it starts on demand",
    }  # fmt: skip
    return words.get(str(desired))


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
