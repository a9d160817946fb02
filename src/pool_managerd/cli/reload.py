"""``reload``: replace what a pool runs, or show what that would do."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pool_managerd.cli.changes import Deadline, NoWait, Prepared, change_one, read_prepared
from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, PoolId, Url, daemon
from pool_managerd.cli.output import Format, Json, show
from pool_managerd.cli.table import facts, write_lines
from pool_managerd.core.reload import Strategy

Model = Annotated[str | None, typer.Option("--model", "-m", help="Another model, as in the configuration: file:PATH.")]
Changed = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A key of the pool's configuration and its value, such as ctx=4096; null unsets it."),
]
Reset = Annotated[bool, typer.Option("--reset", help="Back to what the file says: what earlier reloads have changed goes.")]
How = Annotated[
    Strategy | None,
    typer.Option(
        "--strategy",
        help="blue_green: beside the old engine; sleep_old: while that sleeps; stop_start: after it. Else what fits.",
    ),
]
Plan = Annotated[bool, typer.Option("--plan", help="Show what it would do and how long it would take; nothing happens.")]


def reload(
    pool_id: PoolId, model: Model = None, changes: Changed = None, file: Prepared = None, deadline_ms: Deadline = None,
    reset: Reset = False, strategy: How = None, plan: Plan = False, no_wait: NoWait = False, url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Replace what a pool runs: another model, other keys.

    Where there is room for both, the new engine is started and tried beside the old one, which then ends with its last lease.
    Else no new lease is given, those in flight end, the engine is stopped, the new one started and tried. When it does not do,
    or leases are not back in time, what ran before goes on.
    """
    body: dict[str, Any] = {"new_model_ref": model, "drain_deadline_ms": deadline_ms, "strategy": strategy}
    if changes:
        body["changes"] = _changes(changes)
    if file is not None:
        body["engine"] = read_prepared(file)
    if reset:
        body["reset"] = True
    body = {key: value for key, value in body.items() if value is not None}
    if not body.keys() - {"drain_deadline_ms", "strategy"}:
        raise CommandFailed(
            f"cannot reload {pool_id}: nothing is to change", USAGE, hint="give --model, --set KEY=VALUE, --reset or --file"
        )
    node = daemon(url, config)
    if plan:
        answer: Json = node.request("POST", "pools", pool_id, "reload", body=body, query={"dry_run": True})
        return show(answer, output, show_plan)
    return change_one(node, pool_id, "reload", no_wait, output, body)


def _changes(words: list[str]) -> dict[str, Any]:
    """``provisioning.flags=[...]`` as nested keys; a value is JSON, or else the text that it is."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise CommandFailed(f"cannot use --set {word[:80]!r}", USAGE, hint="write KEY=VALUE, such as ctx=4096")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *path, last = key.split(".")
        here = found
        for part in path:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise CommandFailed(f"cannot set {key!r}: {part!r} was given a value", USAGE)
        here[last] = value
    return found


def show_plan(answer: Json) -> None:
    """What a reload would do, human-readable."""
    down, spread = answer.get("forecast_downtime_ms"), answer.get("forecast_spread_ms")
    forecast = "not known yet: no start and stop of it were measured" if down is None else f"{down} ms, give or take {spread} ms"
    forecast = "none" if down == 0 else forecast
    why = f"{answer.get('strategy')}: {answer.get('why')}"
    facts([("strategy", why), ("downtime", forecast), ("runs", (answer.get("vram") or {}).get("where"))])
    for change in answer.get("changes") or ():
        write_lines([f"  {change['key']}: {json.dumps(change['old'])} -> {json.dumps(change['new'])}"])
    write_lines(f"  {number}. {step}" for number, step in enumerate(answer.get("steps") or (), 1))
