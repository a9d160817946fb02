"""Memory of the whole tree but the engines, at a hundred engines."""

from __future__ import annotations

from collections.abc import Iterator

from bench.fleet import COUNT, Settings, fleets
from bench.processes import pss_bytes
from bench.result import Row, not_measured
from bench.stub import stamps

GOAL_CENTRE_MB, GOAL_SHIM_MB = 90.0, 2.0


def measure(settings: Settings) -> Iterator[Row]:
    with stamps(settings.directory / "memory.pipe") as pipe, fleets(settings, "memory", pipe) as found:
        sizes = {title: [pss_bytes(pid) / 1e6 for pid in fleet.pids()] for title, fleet in found.all().items()}
    # In the order of the tree: the daemon, its fork server, then the shims.
    daemon, forkserver, *shims = sizes["ours"]
    centre, each = daemon + forkserver, sum(shims) / max(1, len(shims))
    yield Row(
        f"proportional memory of daemon and fork server, {COUNT} pools", "MB", centre, goal=f"≤ {GOAL_CENTRE_MB:g} MB",
        reached=centre <= GOAL_CENTRE_MB, note=f"daemon {daemon:.1f}, fork server {forkserver:.1f}",
    )  # fmt: skip
    yield Row(
        "proportional memory of a shim", "MB", each, goal=f"≤ {GOAL_SHIM_MB:g} MB",
        reached=each <= GOAL_SHIM_MB and len(shims) == COUNT, note=f"{len(shims)} shims, the largest {max(shims):.2f}",
    )  # fmt: skip
    for title, reason in found.missing.items():
        yield not_measured(f"whole tree but engines, beside {title}", reason)
    for title in found.others:
        yield Row(
            f"whole tree but engines, beside {title}", "MB", sum(sizes["ours"]), title, sum(sizes[title]),
            note=f"{title}: {len(sizes[title])} processes",
        )  # fmt: skip
