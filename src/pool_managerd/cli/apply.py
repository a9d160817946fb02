"""``apply``, ``config history`` and ``config rollback``: the daemon's file in force, shown first, and only where it differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pool_managerd.cli.changes import NoWait
from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import NO, USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, Url, daemon
from pool_managerd.cli.output import Format, Json, moment, paint, printable, show, span
from pool_managerd.cli.progress import wait_for
from pool_managerd.cli.table import Column, facts, table
from pool_managerd.core.narration import duration

WOULD_CHANGE = 2
_MAX_FILE_BYTES = 1_000_000
File = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", help="This file takes the place of the daemon's own; absent: that one as it is.", show_default=False
    ),
]
Prune = Annotated[bool, typer.Option("--prune", help="Remove pools that it does not name; else they are kept.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan alone; exits 2 when something would change.")]
Number = Annotated[int, typer.Argument(metavar="N", min=1, help="The configuration's number in the history.")]
_SIGNS = {"add": ("+", "32"), "remove": ("-", "31"), "keep": ("=", "")}
_EDITS = {
    "kept": "the file has changes that were not applied; they are overwritten, and kept in the history alone",
    "lost": "the file has changes that were not applied; they are lost",
}
_UNKNOWN = "how long is not known yet"


def apply(
    file: File = None, prune: Prune = False, yes: Yes = False, dry_run: DryRun = False, no_wait: NoWait = False, url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Apply the configuration file to the pools that it changes.

    Shows what would be done, asks, and does it: each changed pool is reloaded, and goes on as it was where the new engine does
    not do. Without --prune, pools that the file does not name any more are kept. A file that cannot be used changes nothing.
    """
    body: dict[str, Any] = {"prune": prune}
    if file is not None:
        body["text"] = _text(file)
    _apply(daemon(url, config), body, yes=yes, dry_run=dry_run, no_wait=no_wait, output=output)


def rollback(
    number: Number, prune: Prune = False, yes: Yes = False, dry_run: DryRun = False, no_wait: NoWait = False, url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Bring a configuration of the history back.

    It takes the place of the daemon's file, and is applied. Secrets in it are those of the file as it is now.
    """
    _apply(daemon(url, config), {"number": number, "prune": prune}, yes=yes, dry_run=dry_run, no_wait=no_wait, output=output)


def history(url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the configurations that were applied."""
    show(daemon(url, config).get("config", "history"), output, _history)


def _apply(node: Daemon, body: dict[str, Any], *, yes: bool, dry_run: bool, no_wait: bool, output: Format) -> None:
    plan: Json = node.request("POST", "apply", body=body, query={"dry_run": True})
    if dry_run:
        show(plan, output, _plan)
        raise typer.Exit(WOULD_CHANGE if plan["would_change"] else 0)
    if output is not Format.JSON:
        _plan(plan)
    if plan["would_change"] and not yes:
        _ask(_EDITS.get(plan.get("edits") or ""))
    operation: Json = node.request("POST", "apply", body={**body, "expect": plan["digest"]})
    if not no_wait:
        operation = _ended(node, operation)
    show(operation, output, _outcome if plan["would_change"] else _nothing)
    if operation.get("status") == "failed":
        error = operation.get("error") or {}
        raise CommandFailed(str(error.get("message")), NO, hint=error.get("hint"))


def _text(file: Path) -> str:
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as source:
            data = source.read(_MAX_FILE_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as problem:
        raise CommandFailed(f"cannot read {file}: {problem}", USAGE) from problem
    if len(data) > _MAX_FILE_BYTES:
        raise CommandFailed(f"cannot apply {file}: it is larger than {_MAX_FILE_BYTES} bytes", USAGE)
    return text


def _ask(warning: str | None) -> None:
    """Raises CommandFailed where nobody can answer, or the answer is no."""
    if not _terminal():
        raise CommandFailed("cannot ask whether to do this: there is no terminal", USAGE, hint="write --yes, or --dry-run")
    question = f"Apply it, although {warning}?" if warning else "Apply it?"
    if not typer.confirm(question, default=False):
        raise CommandFailed("nothing was changed", NO)


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _ended(node: Daemon, operation: Json) -> Json:
    found = operation

    def pending() -> list[str]:
        nonlocal found
        found = node.get("operations", operation["operation_id"])
        if found.get("status") != "running":
            return []
        at = found.get("progress") or {}
        where = f", pool {at['pool_id']}: {str(at.get('action')).replace('_', ' ')}" if at.get("pool_id") else ""
        return [f"apply: {at.get('done', 0)} of {at.get('total', 0)} done{where}"]

    wait_for(pending)
    return found


# --- what is shown ---


def _plan(plan: Json) -> None:
    for row in plan["pools"]:
        sign, style = _SIGNS.get(row["action"], ("~", "33"))
        _line(f"{sign} {row['pool_id']}: {_said(row)}", style)
        for change in row["changes"]:
            _line(f"    {change['key']}: {json.dumps(change['old'])} -> {json.dumps(change['new'])}")
        for warning in row.get("warnings") or ():
            _line(f"    {warning}", "33")
        if row.get("problem"):
            _line(f"    as it is now it would fail, and what runs would go on: {row['problem']}", "31")
    for one in plan.get("by_hand") or ():
        _line(_by_hand(one))
    if plan["at_once"]:
        _line(f"at once, no engine is touched: {', '.join(plan['at_once'])}")
    if plan["waiting"]:
        _line(f"needs a restart of the daemon, and changes nothing now: {', '.join(plan['waiting'])}", "33")
    if plan.get("without_effect"):
        _line(f"has no effect in this version: {', '.join(plan['without_effect'])}", "33")
    if plan.get("replaces_file"):
        _line(f"{plan['file']} is replaced; relative paths are those of its folder")
    if warning := _EDITS.get(plan.get("edits") or ""):
        _line(warning, "33")
    if not plan["would_change"]:
        _line("nothing would change")
        return
    took = plan.get("forecast_duration_ms")
    cost = _UNKNOWN if took is None else f"about {span(took)}" if took else "at once"
    _line(f"{_counted(plan)}; {cost}")


def _counted(plan: Json) -> str:
    """What changes is never nothing: the file alone, where it is neither pools nor settings."""
    pools, settings = sum(row["action"] != "keep" for row in plan["pools"]), len(plan["at_once"])
    told = [f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in ((pools, "pool"), (settings, "setting")) if n]
    untouched = f"{plan['untouched']} untouched" if pools else f"{plan['untouched']} pools untouched"
    return f"{' and '.join(told) or 'only the file'} to change, {untouched}"


def _by_hand(one: Json) -> str:
    """A pool that is not what the file says, and stays so."""
    pool_id, changes = one["pool_id"], one["changes"]
    now = ", ".join(f"{change['key']}={_value(change['old'])}" for change in changes)
    said = ", ".join(_value(change["new"]) for change in changes)
    verb = "runs with" if one["runs"] else "starts with"
    return f"= {pool_id}: {verb} {now} by hand, the file says {said}; reload {pool_id} --reset goes back"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _said(row: Json) -> str:
    """A pool's part in words, with what it costs."""
    action = row["action"]
    if action == "add":
        new = row["adds"]
        ctx = f", context {new['ctx']}" if new["ctx"] else ""
        devices = f", devices {', '.join(map(str, new['devices']))}" if new["devices"] else ""
        slots = "1 slot" if new["slots"] == 1 else f"{new['slots']} slots"
        return f"add {new['engine']} {new['model']}, {slots}{ctx}{devices}; {row['why']}"
    if action == "remove":
        return f"{_ending(row)}forget it: {row['why']}"
    if action == "reload":
        down, spread = row["forecast_downtime_ms"], row["forecast_spread_ms"]
        cost = _UNKNOWN if down is None else f"down for {down} ms, give or take {spread} ms" if down else "without downtime"
        return f"reload ({row['strategy'] or 'not as it is now'}), {cost}: {row['why']}"
    if action == "start":
        ready = row["forecast_duration_ms"]
        return f"start, {_UNKNOWN if ready is None else f'ready in {ready} ms'}: {row['why']}"
    words = {"keep": "kept", "take_over": "no restart", "restart": "stop and start"}
    return f"{words.get(action, action)}: {row['why']}"


def _ending(row: Json) -> str:
    """What a pool that goes is waited for, and how long."""
    if not row.get("ends_by"):
        return ""
    took, spread = row["forecast_duration_ms"], row["forecast_spread_ms"]
    stop = f"stop ({_UNKNOWN if took is None else f'{took} ms, give or take {spread} ms'}) and "
    return f"drain ({duration(row['drain_deadline_ms'] / 1000)} at most), {stop}" if row["ends_by"] == "drain" else stop


def _outcome(operation: Json) -> None:
    if operation.get("status") == "running":
        sys.stdout.write(f"apply: running\noperation {operation.get('operation_id')}\n")
        return
    told = operation.get("outcome") or (operation.get("error") or {}).get("details") or {}
    rows = []
    for pool_id, row in (told.get("pools") or {}).items():
        down = f", was down for {row['downtime_ms']} ms" if row.get("downtime_ms") else ""
        failed = f": {row.get('error')}" if row["status"] == "failed" else ""
        rows.append((pool_id, f"{row['action'].replace('_', ' ')} {row['status']}{down}{failed}"))
    sys.stdout.write(f"apply: {operation.get('status')}\n")
    facts(rows)


def _nothing(operation: Json) -> None:
    del operation


_COLUMNS = (
    Column("N"), Column("APPLIED", 2), Column("BY", 3), Column("POOLS", 4), Column("RESULT", 1), Column("WHAT", 1, 20),
)  # fmt: skip


def _history(rows: list[Json]) -> None:
    """The last one is the present; of those before it a mark says which cannot come back."""
    last = len(rows) - 1
    cells = [
        (
            f"{row['number']}{' (now)' if place == last else '' if row['kept'] else ' (not kept)'}", moment(row["at_ms"]),
            row["origin"], row["pools"], _result(row), row["summary"],
        )
        for place, row in enumerate(rows)
    ]  # fmt: skip
    table(_COLUMNS, cells, empty="no configuration was applied: the daemon has no file")


def _result(row: Json) -> str:
    failed = row.get("failed")
    if failed:
        return f"failed for {failed} pool{'' if failed == 1 else 's'}"
    return str(row.get("result") or "-")


def _line(text: str, style: str = "") -> None:
    sys.stdout.write(paint(printable(text), style) + "\n")
