"""Talking to models through the gateway: ``chat``."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.gateway_client import CaFile, GatewayClient, GatewayUrl, find_gateway
from pool_managerd.cli.options import ConfigFile
from pool_managerd.cli.output import Json, printable

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Its name; the only one when absent.", show_default=False)]
Message = Annotated[str | None, typer.Option("--message", "-m", help="Ask this, and end.", show_default=False)]
System = Annotated[str, typer.Option("--system", help="What the model is told first.")]


def chat(
    model: Model = None, message: Message = None, system: System = "You are a helpful assistant.", url: GatewayUrl = None,
    config: ConfigFile = None, ca_file: CaFile = None,
) -> None:  # fmt: skip
    """Talk to a model, which is started if need be.

    Ctrl-D or an empty line ends it. Ctrl-C ends the answer that is being written.
    """
    gateway = find_gateway(url, config, ca_file)
    talk: list[Json] = [{"role": "system", "content": system}]
    name = model or _only(gateway)
    if message is not None:
        _answer(gateway, name, [*talk, {"role": "user", "content": message}])
        return
    while asked := _asked():
        talk.append({"role": "user", "content": asked})
        talk.append({"role": "assistant", "content": _answer(gateway, name, talk)})


def _asked() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _only(gateway: GatewayClient) -> str:
    names = [row["id"] for row in gateway.call("GET", "models")["data"]]
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise CommandFailed("cannot tell which model is meant", USAGE, hint=f"name one of: {listed}")
    return str(names[0])


def _answer(gateway: GatewayClient, model: str, talk: list[Json]) -> str:
    """What the model says, written as it comes; with how fast that was, on a terminal."""
    said, began, first = "", time.monotonic(), 0.0
    try:
        for event in gateway.stream("/v1/chat/completions", {"model": model, "messages": talk, "stream": True}):
            piece = _piece(event)
            first = first or (time.monotonic() if piece else 0.0)
            said += piece
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" …")
    sys.stdout.write("\n")
    if sys.stderr.isatty() and first:
        sys.stderr.write(f"({first - began:.1f} s to the first word, {time.monotonic() - began:.1f} s in all)\n")
    return said


def _piece(event: Json) -> str:
    """The text in one event of a stream; whatever else an engine sends is none."""
    choices = event.get("choices")
    deltas = [choice.get("delta") for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    return "".join(delta["content"] for delta in deltas if isinstance(delta, dict) and isinstance(delta.get("content"), str))
