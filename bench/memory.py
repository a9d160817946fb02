"""Memory of the whole tree but the engines, at a hundred engines."""

from __future__ import annotations

from collections.abc import Iterator

from bench.fleet import COUNT, Settings, fleets
from bench.processes import command_line, pss_bytes
from bench.result import Row, not_measured
from bench.stub import stamps

GOAL_CENTRE_MB, GOAL_SHIM_MB = 90.0, 2.0
_WORKER = "nvml_worker.py"


def measure(settings: Settings) -> Iterator[Row]:
    with stamps(settings.directory / "memory.pipe") as pipe, fleets(settings, "memory", pipe) as found:
        pids = {title: fleet.pids() for title, fleet in found.all().items()}
        watchers = [pid for pid in pids["ours"] if _WORKER in command_line(pid)]
        sizes = {title: [pss_bytes(pid) / 1e6 for pid in pids[title]] for title in pids}
        worker = sum(pss_bytes(pid) for pid in watchers) / 1e6
        # In the order of the tree: the daemon, its fork server, then the shims. The NVML worker is looked at apart.
        daemon, forkserver, *shims = [pss_bytes(pid) / 1e6 for pid in pids["ours"] if pid not in watchers]
    centre, each = daemon + forkserver, sum(shims) / max(1, len(shims))
    beside = f"{len(watchers)} NVML worker {worker:.1f}"
    yield Row(
        f"proportional memory of daemon and fork server, {COUNT} pools", "MB", centre, goal=f"≤ {GOAL_CENTRE_MB:g} MB",
        reached=centre <= GOAL_CENTRE_MB, note=f"daemon {daemon:.1f}, fork server {forkserver:.1f}, beside them {beside}",
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
