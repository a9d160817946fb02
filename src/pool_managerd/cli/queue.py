"""``queue``: who waits for a slot, and what asking for a model would lead to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pool_managerd.cli.exits import NO, OK, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, Url, daemon
from pool_managerd.cli.output import Format, Json, show, span
from pool_managerd.cli.table import Column, table, write_lines

Cancel = Annotated[
    str | None, typer.Option("--cancel", metavar="TICKET", help="Have this request wait no more.", show_default=False)
]
_TICKETS = (
    Column("TICKET", 0, least=8), Column("POOL", 0, least=7, middle=True), Column("PLACE", 1), Column("WAITED", 2),
    Column("LEFT", 4), Column("PRIORITY", 5), Column("HOLDER", 6, least=8), Column("WAITS FOR", 3, least=21),
)  # fmt: skip


def queue(cancel: Cancel = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the requests that wait for a slot, in their order."""
    node = daemon(url, config)
    if cancel is not None:
        told = node.request("DELETE", "queue", cancel)
        show(told, output, lambda _: table((), (), empty=f"ticket {cancel} waits no more"))
        return

    def rows(found: list[Json]) -> None:
        table(_TICKETS, map(_row, found), empty="nobody waits", wide=output is Format.WIDE)

    show(node.get("queue"), output, rows)


def _row(ticket: Json) -> tuple[Any, ...]:
    left = ticket.get("estimate_ms")
    what = f"{ticket['waits_for']}, about {span(left)}" if left is not None else ticket["waits_for"]
    return (
        ticket["ticket_id"], ticket["pool_id"], ticket["place"], span(ticket["waited_ms"]), span(ticket["left_ms"]),
        ticket["priority"] or None, ticket.get("holder"), what,
    )  # fmt: skip


def would_lead_to(node: Any, model: str, output: Format) -> None:
    """What a request for ``model`` would lead to; exits 1 where it would be refused."""
    try:
        answer: Json = node.request("POST", "acquire", body={"model": model}, query={"dry_run": "true"})
    except CommandFailed as refusal:
        if refusal.code != "MODEL_NOT_FOUND":
            raise
        would = f"a request for {model!r} would be refused: {refusal.message}"
        answer = {"model": model, "would": would, "refused": refusal.message, "hint": refusal.hint}
    show(answer, output, lambda _: write_lines(_lines(answer)))
    raise typer.Exit(NO if answer.get("refused") else OK)


def _lines(answer: Json) -> Iterator[str]:
    yield answer["would"][:1].upper() + answer["would"][1:]
    for one in answer.get("stops") or ():
        in_flight, stop, load = one["in_flight"], one.get("stop_ms"), one.get("load_again_ms")
        busy = f"{in_flight} in flight" if in_flight else f"idle for {span(one['idle_ms'])}"
        costs = [f"stops in {span(stop)}"] if stop is not None else []
        costs += [f"takes {span(load)} to come back"] if load is not None else []
        yield f"  - {one['action']}: {one['pool_id']} ({', '.join([busy, *costs])})"
    if answer.get("waiting"):
        yield f"  - {answer['waiting']} wait for it already"
    if answer.get("hint"):
        yield f"  hint: {answer['hint']}"
