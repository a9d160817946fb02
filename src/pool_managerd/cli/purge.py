"""``purge``: delete what is kept on disk for a pool, after showing what that is."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import NO, USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, PoolId, Url, daemon
from pool_managerd.cli.output import Format, Json, printable, show
from pool_managerd.cli.progress import sentence, wait_for
from pool_managerd.core.narration import size

Models = Annotated[bool, typer.Option("--models", help="Its model, too, where that is in a cache of the daemon.")]
Cache = Annotated[bool, typer.Option("--cache", help="Its cache, too, which later starts would use again.")]
Engine = Annotated[bool, typer.Option("--engine", help="Its engine, too, where that is in a cache of the daemon.")]
Force = Annotated[bool, typer.Option("--force", help="Stop an engine that runs at once.")]
NoDrain = Annotated[bool, typer.Option("--no-drain", help="Refuse while an engine runs, instead of draining it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; nothing happens.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def purge(
    pool_id: PoolId, models: Models = False, cache: Cache = False, engine: Engine = False, force: Force = False,
    no_drain: NoDrain = False, dry_run: DryRun = False, yes: Yes = False, url: Url = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Stop a pool and delete what is kept on disk for it.

    Its working directory, with --cache its cache. Files of yours are never deleted: they are named instead. The pool stays down.
    """
    node = daemon(url, config)
    body: dict[str, Any] = {
        "purge_engine": engine, "delete_cache_dirs": cache, "force": force, "drain_first": not no_drain, "purge_models": [],
    }  # fmt: skip
    if models:
        pool: Json = node.get("pools", pool_id, "status")
        body["purge_models"] = [pool.get("model_ref") or pool.get("model_id") or "its model"]
    plan: Json = node.request("POST", "pools", pool_id, "purge", body=body, query={"dry_run": True})
    if dry_run:
        return show(plan, output, _plan)
    if not yes:
        _ask(plan)
    ended = _ended(node, node.request("POST", "pools", pool_id, "purge", body=body))
    if ended.get("status") == "failed":
        failure = ended.get("error") or {}
        raise CommandFailed(str(failure.get("message")), NO, hint=failure.get("hint"), code=failure.get("code"))
    return show(ended, output, _outcome)


def _ask(plan: Json) -> None:
    if not sys.stdin.isatty():
        raise CommandFailed(
            f"cannot purge {plan.get('pool_id')}: nobody is there to be asked whether it is meant", USAGE,
            hint="write --yes; --dry-run shows what would be deleted",
        )  # fmt: skip
    _plan(plan)
    if not typer.confirm("Delete it?"):
        raise CommandFailed("nothing was deleted", NO)


def _ended(node: Daemon, operation: Json) -> Json:
    last = operation

    def pending() -> list[str]:
        nonlocal last
        last = node.get("operations", operation["operation_id"])
        return [sentence(node.get("pools", operation["pool_id"], "status"))] if last.get("status") == "running" else []

    wait_for(pending)
    return last


def _plan(plan: Json) -> None:
    stops = {"drain": "drains and stops its engine", "stop": "stops its engine at once"}.get(str(plan.get("stops_by")))
    if stops:
        sys.stdout.write(f"{stops}\n")
    _rows(plan.get("would_remove") or [], "deletes", "nothing is kept on disk for it")
    sys.stdout.write(f"frees {size(plan.get('would_free_bytes') or 0)}\n")


def _outcome(operation: Json) -> None:
    outcome = operation.get("outcome") or {}
    _rows(outcome.get("removed") or [], "deleted", "nothing was kept on disk for it")
    sys.stdout.write(f"pool {operation.get('pool_id')} is purged: {size(outcome.get('freed_bytes') or 0)} freed\n")


def _rows(rows: list[Json], what: str, nothing: str) -> None:
    for row in rows:
        sys.stdout.write(printable(f"{what} {row['path']} ({size(row['bytes'])})") + "\n")
    if not rows:
        sys.stdout.write(nothing + "\n")
