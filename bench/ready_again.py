"""Twenty engines are killed at once: how long until each is ready again, beside the time that the engines themselves need."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.daemon import Daemon, ReadyWatch
from bench.fleet import Settings, our_fleet
from bench.own_load import load_times_ms
from bench.processes import kill_checked
from bench.result import NotInstalledError, Row, not_measured, quantile
from bench.stub import free_ports
from pool_managerd.testing import fake_engine

AT_ONCE = 20
MARGIN_MS = 100.0
LOAD_S = 0.3


def measure(settings: Settings) -> Iterator[Row]:
    load_ms = ("--load-ms", f"{LOAD_S * 1000:.0f}")
    try:
        engine = [str(settings.engine())]
        yield _row(settings, f"the smallest engine, {LOAD_S:g} s load", engine, load_ms)
    except NotInstalledError as missing:
        yield not_measured("killed → ready again, the smallest engine", str(missing))
    script = settings.directory / "scripted.py"
    shutil.copyfile(str(fake_engine.__file__), script)
    script.chmod(0o644)
    scripted = [str(Path(sys.executable).resolve()), "-I", "-S", str(script)]
    yield _row(settings, f"a Python engine, {LOAD_S:g} s load", scripted, ("--ready-after", f"{LOAD_S:g}"))


def _row(settings: Settings, kind: str, program: Sequence[str], flags: Sequence[str]) -> Row:
    rounds = 1 if settings.quick else 5
    ports = free_ports(AT_ONCE, 16_000)
    argvs = [[*program, "--port", str(port), *flags] for port in ports]
    alone = quantile([load_times_ms(argvs[:1], ports[:1], 0.001)[0] for _ in range(3)], 0.5)
    together = [took for _ in range(rounds) for took in load_times_ms(argvs, ports, 0.004)]
    where = settings.directory / f"ready-{len(list(settings.directory.iterdir()))}"
    names = [f"pool-{number:02}" for number in range(AT_ONCE)]
    with our_fleet(where, names, argvs, health={"probe_interval_ms": 5_000}) as node, ReadyWatch(node.port) as watch:
        took = [ms for _ in range(rounds) for ms in _kill_all(node, names, watch, str(settings.directory), program)]
    ours, theirs = quantile(took, 0.99), quantile(together, 0.99)
    return Row(
        f"{AT_ONCE} killed at once → ready again, p99 ({kind})", "ms", ours, "the engines' own load", theirs,
        f"≤ own load + {MARGIN_MS:g} ms", ours <= theirs + MARGIN_MS,
        f"p50 {quantile(took, 0.5):.0f}; own load alone {alone:.0f}, {AT_ONCE} at once p50 {quantile(together, 0.5):.0f} ms",
    )  # fmt: skip


def _kill_all(node: Daemon, names: Sequence[str], watch: ReadyWatch, marker: str, program: Sequence[str]) -> list[float]:
    states = node.states()
    watch.clear()
    own = marker if marker in program[0] else str(program[-1])
    killed = {name: kill_checked(states[name]["pid"], own) for name in names}
    ready = watch.wait_for(names)
    node.wait_ready(names)
    return [(ready[name] - killed[name]) / 1e6 for name in names]
