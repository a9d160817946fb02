"""``wait``: until pools are as they are wanted."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pool_managerd.cli.exits import NO, UNREACHABLE, CommandFailed
from pool_managerd.cli.options import All, ConfigFile, Output, PoolIds, Url, chosen, daemon, seconds
from pool_managerd.cli.output import Format, Json, show
from pool_managerd.cli.progress import sentence, wait_for


class Goal(enum.StrEnum):
    """What is waited for."""

    READY = "ready"
    LIVE = "live"
    DOWN = "down"
    DRAINED = "drained"
    FAILED = "failed"


For = Annotated[Goal, typer.Option("--for", help="What the pools are to be.")]
Timeout = Annotated[str, typer.Option("--timeout", metavar="TIME", help="How long at most, such as 30s or 5m; 0 looks once.")]
_REACHED: dict[Goal, Callable[[Json], bool]] = {
    Goal.READY: lambda pool: bool(pool["ready"]),
    Goal.LIVE: lambda pool: bool(pool["live"]),
    Goal.DOWN: lambda pool: not pool["live"] and pool["state"] in ("uninitialized", "offline", "failed"),
    Goal.DRAINED: lambda pool: bool(pool.get("drained")) and not pool["live"] and pool["state"] == "offline",
    Goal.FAILED: lambda pool: pool["state"] == "failed",
}


def wait(
    ids: PoolIds = None, every: All = False, goal: For = Goal.READY, timeout: Timeout = "5m", url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Wait until pools are ready, down or drained.

    A daemon that does not answer is asked again until then. Exits 1 when the time is over first, or when a pool that is to
    become ready has failed for good; 3 when the time is over and the daemon cannot be reached.
    """
    limit = seconds(timeout, "--timeout")
    node = daemon(url, config)
    wanted: list[str] | None = None
    seen: dict[str, Json] = {}
    unreached: CommandFailed | None = None

    def pending() -> list[str]:
        nonlocal wanted, unreached
        try:
            wanted = chosen(node, ids, every) if wanted is None else wanted
            for pool_id in wanted:
                if pool_id not in seen or not _REACHED[goal](seen[pool_id]):
                    seen[pool_id] = node.get("pools", pool_id, "status")
                    _refuse_hopeless(seen[pool_id], goal)
            unreached = None
        except CommandFailed as failure:
            if failure.exit_code != UNREACHABLE:
                raise
            unreached = failure
            return [f"waiting for the daemon: {failure.message}"]
        return [sentence(pool) for pool in seen.values() if not _REACHED[goal](pool)]

    if not wait_for(pending, timeout_s=limit):
        if unreached is not None:
            said = f"cannot wait longer than {timeout} for --for={goal}: {unreached.message}"
            raise CommandFailed(said, UNREACHABLE, hint=unreached.hint)
        late = [pool for pool in seen.values() if not _REACHED[goal](pool)]
        names = ", ".join(f"{pool['pool_id']} is {pool['state']}" for pool in late)
        errors = next((str(pool["last_error"]) for pool in late if pool.get("last_error")), None)
        raise CommandFailed(f"cannot wait longer than {timeout} for --for={goal}: {names}", NO, hint=errors)
    answer = [{"pool_id": pool_id, "state": seen[pool_id]["state"], goal.value: True} for pool_id in wanted or ()]

    def lines(rows: list[Json]) -> None:
        for row in rows:
            sys.stdout.write(f"pool {row['pool_id']} is {goal}\n")

    show(answer, output, lines)


def _refuse_hopeless(pool: Json, goal: Goal) -> None:
    """A pool that failed for good becomes ready by nobody's waiting."""
    if goal in (Goal.READY, Goal.LIVE) and pool["state"] == "failed" and pool.get("reason") != "circuit_open":
        why = pool.get("last_error") or pool.get("reason")
        raise CommandFailed(f"cannot wait for pool {pool['pool_id']}: it has failed: {why}", NO)
