"""Draws the pictures beside this file from their text sources: ``python -m docs.pictures.make``. A test compares them.

``make pictures`` records the transcripts anew before (record.sh).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from docs.pictures import diagram, packages, terminal

from tests.core.chart import seen_edges

HERE = Path(__file__).resolve().parent
SLOWER = 4.0
"""The demo takes a second: nobody could read along."""


def _demo() -> str:
    lines = transcript("demo.txt")
    return terminal.picture(
        terminal.timed(lines, SLOWER),
        "A recording of pool-managerd demo",
        f"The times are those of the run; it is shown {SLOWER:g} times as slow. " + " ".join(" ".join(lines).split()),
    )


def _reload() -> str:
    lines = transcript("reload.txt")
    about = "The times are those of the run. " + " ".join(" ".join(lines).split())
    return terminal.picture(terminal.timed(lines, 1.0), "A recording of a reload that rolls back", about)


def _devices() -> str:
    lines = transcript("devices.txt")
    return terminal.picture([(line, 0.0) for line in lines], "pool-managerd devices", " ".join(" ".join(lines).split()))


def _states() -> str:
    """Coloured by where an arrow leads, so that a way can be followed."""
    colours = {"backoff": "red", "failed": "red", "draining": "blue", "stopping": "blue", "offline": "blue"}
    edges = {(start, end): colours.get(end, "green") for start, end in seen_edges()}
    about = "; ".join(f"{start} can become {end}" for start, end in sorted(edges))
    return diagram.states(source("states.toml"), edges, about)


def _architecture() -> str:
    return diagram.architecture(source("architecture.toml"))


def source(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / name).read_text("utf-8"))


def transcript(name: str) -> list[str]:
    """What was recorded, without what the demo says about going on."""
    lines = (HERE / name).read_text("utf-8").splitlines()
    if "Go on" in lines:
        del lines[lines.index("Go on") : lines.index("Stopping")]
    return lines


def pictures() -> dict[str, str]:
    """File name and text of every picture."""
    return {
        "demo.svg": _demo(),
        "devices.svg": _devices(),
        "reload.svg": _reload(),
        "architecture.svg": _architecture(),
        "states.svg": _states(),
        "packages.svg": packages.picture(),
    }


if __name__ == "__main__":
    for name, text in pictures().items():
        (HERE / name).write_text(text, encoding="utf-8")
