"""Requests at the gateway: ``requests`` lists them or shows one, ``cancel`` ends one."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from pool_managerd.cli.gateway_client import CaFile, GatewayUrl, find_gateway
from pool_managerd.cli.options import ConfigFile, Output
from pool_managerd.cli.output import Format, Json, moment, printable, show, span
from pool_managerd.cli.table import Column, facts, table, wrapped, write_lines
from pool_managerd.core.narration import duration

RequestId = Annotated[str, typer.Argument(metavar="ID", help="The request's id, as `requests` lists it.")]
OptionalRequestId = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="One request, and what it says; all of them when absent.", show_default=False)
]
_REQUESTS = (
    Column("REQUEST", 0, least=12, middle=True), Column("MODEL", 0, least=7, middle=True), Column("STATE", 0, least=7),
    Column("QUEUED", 2), Column("FIRST", 3), Column("TOOK", 1), Column("IN", 4), Column("OUT", 4), Column("STATUS", 5),
)  # fmt: skip


def requests(
    request_id: OptionalRequestId = None, url: GatewayUrl = None, config: ConfigFile = None, ca_file: CaFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """List the gateway's requests: the last ones, and those in flight.

    With an ID that one alone, with its body and its answer where gateway.capture_bytes keeps them.
    """
    gateway = find_gateway(url, config, ca_file)
    if request_id is not None:
        show(gateway.call("GET", "requests", request_id), output, _one)
        return

    def rows(found: list[Json]) -> None:
        table(_REQUESTS, map(_row, found), empty="there was no request yet", wide=output is Format.WIDE)

    show(gateway.call("GET", "requests"), output, rows)


def _row(one: Json) -> tuple[Any, ...]:
    first = one["first_token_ms"]
    return (
        one["request_id"], one["model"], one["state"], span(one["queued_ms"]), None if first is None else span(first),
        span(one["duration_ms"]), one["tokens_in"], one["tokens_out"], one["status"],
    )  # fmt: skip


def _one(found: Json) -> None:
    counts = [(found[f"tokens_{name}"], name) for name in ("in", "cached", "out")]
    tokens = ", ".join(f"{count} {name}" for count, name in counts if count is not None)
    facts((
        ("request", found["request_id"]), ("path", found["path"]), ("model", found["model"]), ("pool", found["pool_id"]),
        ("state", found["state"]), ("status", found["status"]), ("error", found["error"]),
        ("began", moment(found["began_at_ms"])), ("queued", _duration(found["queued_ms"])),
        ("first token", _duration(found["first_token_ms"])), ("took", _duration(found["duration_ms"])),
        ("tokens", tokens or None), ("not captured", found["not_captured"]),
    ))  # fmt: skip
    captured = found["captured"] or {}
    for name in ("request", "answer"):
        if (body := captured.get(name)) is not None:
            _body(name, body)


def _body(name: str, body: Json) -> None:
    kind = body["headers"].get("content-type") or "no type"
    cut = ", of which this is the beginning" if body["truncated"] else "" if body["text"] is not None else ", which is no text"
    sys.stdout.write("\n")
    write_lines([f"{name}: {body['bytes']:,} bytes, {kind}{cut}"])
    text = _readable(body["text"] or "").removesuffix("\n")
    for line in text.split("\n") if text else ():
        sys.stdout.write(f"  {wrapped(printable(line), 2)}".rstrip() + "\n")


def _readable(text: str) -> str:
    """JSON by its structure, anything else as it is."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _duration(ms: int | None) -> str | None:
    return None if ms is None else duration(ms / 1000)


def cancel(request_id: RequestId, url: GatewayUrl = None, config: ConfigFile = None, ca_file: CaFile = None) -> None:
    """End a request: its engine stops working on it."""
    find_gateway(url, config, ca_file).call("DELETE", "requests", request_id)
    typer.echo(f"request {printable(request_id)} is cancelled")
