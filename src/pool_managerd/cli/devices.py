"""``devices``: the GPUs as a picture, and what an operator may decide about them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from pool_managerd.cli import completion
from pool_managerd.cli.options import ConfigFile, Output, Url, daemon
from pool_managerd.cli.output import SGR, Format, Json, as_typed, paint, plain, show, span
from pool_managerd.cli.picture import Line, draw

_PIPE_COLUMNS, _MOST_COLUMNS, _FEWEST_COLUMNS = 80, 120, 40
DeviceId = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The device's index, or the UUID of a GPU or MIG instance.", autocompletion=completion.device_ids
    ),
]


def devices(context: typer.Context, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Show the GPUs' memory: who holds how much of it.

    What the pools use and have reserved, who else is there, what is free.
    """
    if context.invoked_subcommand is None:
        show(daemon(url, config).get("devices"), output, _pictures)


def cordon(device: DeviceId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Start nothing new on a device; what runs there goes on."""
    show(daemon(url, config).request("POST", "devices", device, "cordon"), output, _one)


def uncordon(device: DeviceId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Use a device for new starts again."""
    show(daemon(url, config).request("POST", "devices", device, "uncordon"), output, _one)


def release(url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Release NVML, so that the driver can be upgraded.

    Nothing new is started meanwhile.
    """
    show(daemon(url, config).request("POST", "devices", "release"), output, _released)


def resume(url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Reinitialise NVML after a release."""
    show(daemon(url, config).request("POST", "devices", "resume"), output, _pictures)


def _one(row: Json) -> None:
    marks = ", cordoned" if row["cordoned"] else ""
    sys.stdout.write(f"device {plain(row['device'])} ({plain(row['name'])}): {plain(row['state'])}{marks}\n")


def _released(found: Json) -> None:
    """What keeps the driver in use although we released it stands first."""
    if pools := sorted({str(held["pool_id"]) for device in found["devices"] for held in device["reservations"]}):
        drain = as_typed(f"pool-managerd drain {' '.join(map(plain, pools))}")
        sys.stdout.write(f"The engines of {len(pools)} pool{'s' * (len(pools) > 1)} still use the driver.\nhint: {drain}\n")
    _pictures(found)


def _pictures(found: Json) -> None:
    width = min(_MOST_COLUMNS, max(_FEWEST_COLUMNS, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else _PIPE_COLUMNS
    _write([*_remarks(found), *_rows(found, width)])


def _rows(found: Json, width: int) -> Iterator[Line]:
    for index, device in enumerate(found["devices"]):
        if index:
            yield Line(())
        yield from draw(device, found.get("driver_version"), width)
    if not found["devices"]:
        yield Line((("no GPU is known" if found["stale"] else "no GPU was found", ""),))


def _remarks(found: Json) -> Iterator[Line]:
    """What must be known before what they show is believed."""
    if found["simulated"]:
        yield Line((("These GPUs are simulated.", "yellow"),))
    problem = found.get("problem") or {}
    if found["stale"]:
        shown = bool(found["devices"]) and found.get("age_ms") is not None
        age = f"Stale, last read {span(found['age_ms'])} ago: " if shown else ""
        yield Line(((f"{age}{plain(problem.get('message') or 'the GPUs cannot be read')}", "bold red"),))
        if problem.get("hint"):
            yield Line(((f"hint: {plain(problem['hint'])}", ""),))


def _write(lines: list[Line]) -> None:
    """Plain text into a pipe, colours on a terminal; lines are never wrapped."""
    for line in lines:
        sys.stdout.write("".join(paint(text, SGR.get(style, "")) for text, style in line.spans).rstrip() + "\n")
