"""``yield``: the GPUs are somebody else's for a while."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from pool_managerd.cli import completion
from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, Url, daemon, seconds
from pool_managerd.cli.output import Format, Json, show
from pool_managerd.cli.table import Column, table

Gpu = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu", metavar="ID", help="Only this GPU; several times, for several.", autocompletion=completion.device_ids,
        show_default=False,
    ),
]  # fmt: skip
For = Annotated[
    str | None, typer.Option("--for", metavar="2h", help="How long; else until it is taken back.", show_default=False)
]
End = Annotated[bool, typer.Option("--end", help="Take the GPUs back.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return when no pool is left there.")]
Show = Annotated[bool, typer.Option("--show", help="Only list what is left to others.")]
_COLUMNS = (Column("GPU", 0, least=3), Column("UNTIL", 1), Column("STILL THERE", 2, least=20))
_LOOK_S = 0.3


def yield_(
    gpu: Gpu = None, for_: For = None, end: End = False, wait: Wait = False, show_only: Show = False, url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Leave the GPUs to other programs for a while.

    Idle pools go, busy ones once their requests have ended; nothing starts there. Afterwards pools that run with the daemon come
    back, the others when they are asked for.
    """
    if sum((end, show_only, for_ is not None)) > 1 or (wait and (end or show_only)):
        raise CommandFailed("cannot do all of that at once: --for and --wait begin, --end takes back, --show lists", USAGE)
    node, lasts = daemon(url, config), seconds(for_, "--for")
    if show_only:
        rows = node.get("yield")
    elif end:
        rows = node.request("DELETE", "yield", body={"devices": gpu or []})
    else:
        for_ms = None if lasts is None else round(lasts * 1000)
        rows = node.request("POST", "yield", body={"devices": gpu or [], "for_ms": for_ms})
        wanted = {row["uuid"] for row in rows}
        while wait and any(row["pools"] for row in rows if row["uuid"] in wanted):
            time.sleep(_LOOK_S)
            rows = node.get("yield")
    show(rows, output, _listed)


def _listed(rows: list[Json]) -> None:
    table(_COLUMNS, map(_row, rows), empty="no GPU is left to others")


def _row(row: Json) -> tuple[Any, ...]:
    until = row["until_ms"]
    shown = "it is taken back" if until is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(until / 1000))
    return row["device"], shown, ", ".join(map(_still, row["pools"])) or "nobody"


def _still(pool: Json) -> str:
    busy = f", {pool['in_flight']} in flight" if pool["in_flight"] else ""
    return f"{pool['pool_id']} ({pool['state']}{busy})"
