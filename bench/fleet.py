"""A hundred of the smallest engine, under us or under another supervisor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.daemon import Daemon, daemon
from bench.processes import tree
from bench.result import NotInstalledError
from bench.stub import Stamps, compile_engine, free_ports
from bench.supervisors import SUPERVISORS

COUNT = 100
AT_ONCE = {
    "health": {"interval_ms": 200, "probe_interval_ms": 5_000},
    "supervision": {
        "backoff": {"initial_ms": 0, "min_delay_ms": 0, "jitter": 0},
        "breaker": {"threshold": 100},  # engines that are killed in several rounds are not crash loops
        "restart_limit": {"max_restarts": 100, "storm_open": 100},
    },
}


@dataclass(frozen=True, slots=True)
class Settings:
    """``directory`` may be read by every user; it is removed at the end."""

    directory: Path
    quick: bool

    def engine(self) -> Path:
        return compile_engine(self.directory)


@dataclass(frozen=True, slots=True)
class Fleet:
    """``root`` is the supervisor's pid; ``names`` are those the engines stamp with."""

    root: int
    names: tuple[str, ...]
    engine: str

    def pids(self) -> list[int]:
        """The supervisor's whole tree without the engines."""
        return [pid for pid in tree(self.root) if not _runs(pid, self.engine)]


@dataclass
class Fleets:
    """All that could be started, by supervisor, and why others could not."""

    ours: Fleet
    others: dict[str, Fleet] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def all(self) -> dict[str, Fleet]:
        return {"ours": self.ours, **self.others}


@contextlib.contextmanager
def fleets(settings: Settings, where: str, pipe: Stamps) -> Iterator[Fleets]:
    """``COUNT`` engines under each supervisor that is installed; all of them have begun, ours are ready."""
    engine = settings.engine()
    ports = iter(free_ports(COUNT * (1 + len(SUPERVISORS))))
    with contextlib.ExitStack() as stack:
        names, programs = _programs("ours", engine, ports, pipe)
        ours = stack.enter_context(our_fleet(settings.directory / f"{where}-ours", names, programs))
        found = Fleets(Fleet(ours.pid, tuple(names), str(engine)))
        for title, start in SUPERVISORS.items():
            names, programs = _programs(title, engine, ports, pipe)
            try:
                child = stack.enter_context(
                    start(settings.directory / f"{where}-{title}", dict(zip(names, programs, strict=True)))
                )
            except NotInstalledError as missing:
                found.missing[title] = str(missing)
                continue
            found.others[title] = Fleet(child.pid, tuple(names), str(engine))
        for fleet in found.all().values():
            for name in fleet.names:
                pipe.next_after(name, None, 60.0)
        yield found


@contextlib.contextmanager
def our_fleet(directory: Path, names: Sequence[str], programs: Sequence[Sequence[str]], **sections: Any) -> Iterator[Daemon]:
    """A daemon with one ready pool per program; each names its port behind ``--port``."""
    with daemon(directory, **{**AT_ONCE, **sections}) as running_daemon:
        for name, argv in zip(names, programs, strict=True):
            running_daemon.submit(name, argv, int(argv[argv.index("--port") + 1]))
        running_daemon.wait_ready(names)
        yield running_daemon


def _programs(title: str, engine: Path, ports: Iterator[int], pipe: Stamps) -> tuple[list[str], list[list[str]]]:
    names = [f"{title}-{number:03}" for number in range(COUNT)]
    flags = ["--stamp", str(pipe.path)]
    return names, [[str(engine), "--port", str(next(ports)), *flags, "--name", name] for name in names]


def _runs(pid: int, program: str) -> bool:
    try:
        return str(Path(f"/proc/{pid}/exe").readlink()) == program
    except OSError:
        return False
