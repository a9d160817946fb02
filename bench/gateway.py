"""The gateway: how many chats it passes on, what it adds to each, its memory; beside llama-swap, nginx and the engine alone."""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.daemon import Daemon, answers, daemon
from bench.fleet import Settings
from bench.gateway_peers import llama_swap, nginx
from bench.load import CHAT_PATH, Loaded, Loads, chat
from bench.processes import pss_bytes, running, tree, wait_until
from bench.result import NotInstalledError, Row, quantile
from bench.stub import compile_program, free_ports

CONNECTIONS = 16
STREAMS, TOKEN_MS = 64, 20
IDLE = 1_000
GOAL_RATE, GOAL_ALONE = 1.25, 0.8
GOAL_FIRST_MS, GOAL_GAP_MS = 2.0, 1.0
GOAL_MB, GOAL_IDLE_MB = 80.0, 60.0
_SWAP, _NGINX, _DIRECT = "llama-swap", "nginx", "the engine alone"
_ENGINES = {
    "chat": "--token-ms 0 --tokens 10",
    "steady": f"--token-ms {TOKEN_MS} --tokens 50",
    "batch": f"--token-ms {TOKEN_MS} --tokens 50 --in-step 1",
    "silent": "--token-ms 600000 --tokens 2",
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the measurements: each round of each target takes so many seconds."""

    rounds: int
    seconds: float
    stream_seconds: float


@dataclass(frozen=True, slots=True)
class Site:
    """A daemon with its pools; ``engines``: the port of each pool's engine. ``peers``: those in front of chats, by name."""

    node: Daemon
    loads: Loads
    engines: Mapping[str, int]
    gateway: int
    gateway_pid: int
    peers: dict[str, int] = field(default_factory=dict)


def measure(settings: Settings) -> Iterator[Row]:
    lengths = Lengths(2, 2.0, 6.0) if settings.quick else Lengths(5, 5.0, 20.0)
    directory, loads = settings.directory, Loads(settings.directory)
    engine = str(compile_program(directory, "stream_engine"))
    with _open_files(), daemon(directory / "gateway") as node, contextlib.ExitStack() as stack:
        ports = dict(zip(_ENGINES, free_ports(len(_ENGINES)), strict=True))
        for name, flags in _ENGINES.items():
            node.submit(name, [engine, "--port", str(ports[name]), *flags.split()], ports[name], slots=1024)
        node.wait_ready(list(_ENGINES))
        front, pid = stack.enter_context(_gateway(node))
        site = Site(node, loads, ports, front, pid)
        missing = _enter_peers(stack, site, directory, [engine, *_ENGINES["chat"].split()])
        yield from _saturated(site, lengths, missing)
        yield from _added(site, lengths, settings)
        memory = _memory_mb(site.gateway_pid)
        yield Row(
            "memory of the gateway after these runs (PSS)", "MB", memory, goal=f"≤ {GOAL_MB:g} MB", reached=memory <= GOAL_MB
        )
        yield _idle(node)


def _enter_peers(stack: contextlib.ExitStack, site: Site, directory: Path, engine: Sequence[str]) -> list[str]:
    """Start those that are installed; why others are not there."""
    missing = []
    starts: dict[str, Callable[[], contextlib.AbstractContextManager[int]]] = {
        _SWAP: lambda: llama_swap(directory, {"chat": engine}),
        _NGINX: lambda: nginx(directory, site.engines["chat"]),
    }
    for name, start in starts.items():
        try:
            site.peers[name] = stack.enter_context(start())
        except NotInstalledError as reason:
            missing.append(str(reason))
    site.peers[_DIRECT] = site.engines["chat"]
    return missing


@contextlib.contextmanager
def _gateway(node: Daemon) -> Iterator[tuple[int, int]]:
    """Port and pid of a gateway that follows ``node``."""
    (port,) = free_ports(1, 19_500)
    config = str(node.directory / "pool-managerd.yaml")
    argv = [sys.executable, "-m", "pool_managerd.cli", "gateway", "--config", config, "--bind", f"127.0.0.1:{port}"]
    with running(argv, node.directory / f"gateway-{port}.log", cwd=node.directory) as child:
        wait_until(lambda: child.poll() is not None or answers(port), "the gateway to answer", 30.0)
        wait_until(lambda: answers(port, "/v1/models/chat"), "the gateway to know the pools", 30.0)
        yield port, child.pid


# --- as many as it can ---


@dataclass(frozen=True, slots=True)
class Race:
    """The gateway beside the others: ``figure`` of a run, in ``unit``, is to be ``at_least`` (or at most) ``factor`` times
    llama-swap's.
    """

    what: str
    stream: bool
    connections: int
    figure: str
    unit: str
    factor: float
    at_least: bool

    def won(self, ours: float, theirs: float) -> bool:
        return ours >= self.factor * theirs if self.at_least else ours <= self.factor * theirs


_AT_ONCE = f"saturated, {CONNECTIONS} connections"
_RACES = (
    Race(f"{_AT_ONCE}, short replies", False, CONNECTIONS, "rate", "responses/s", GOAL_RATE, True),
    Race(f"{_AT_ONCE}, streams of 10 tokens at once", True, CONNECTIONS, "rate", "responses/s", GOAL_RATE, True),
    Race("one short reply, one connection, p50", False, 1, "whole_p50", "ms", GOAL_ALONE, False),
)


def _saturated(site: Site, lengths: Lengths, missing: Sequence[str]) -> Iterator[Row]:
    for race in _RACES:
        runs = _in_turn(site, lengths, race)
        found = {name: _median(these, race.figure) for name, these in runs.items()}
        failed = {name: count for name, these in runs.items() if (count := sum(run.failed for run in these))}
        swap = found.get(_SWAP)
        reached = None if swap is None else race.won(found["ours"], swap) and "ours" not in failed
        said = [f"p99 {_median(runs['ours'], 'whole_p99'):.2f} ms"]
        said += [f"{name} {_number(found[name])}" for name in (_NGINX, _DIRECT) if name in found]
        said += [f"{count} failed of {name}" for name, count in failed.items()]
        yield Row(
            race.what, race.unit, found["ours"], "" if swap is None else _SWAP, swap,
            f"{'≥' if race.at_least else '≤'} {race.factor:g} × {_SWAP}", reached, "; ".join([*said, *missing]),
        )  # fmt: skip


def _in_turn(site: Site, lengths: Lengths, race: Race) -> dict[str, list[Loaded]]:
    """Rounds in which each is asked after the other."""
    ask = functools.partial(site.loads.run, model="chat", stream=race.stream, connections=race.connections)
    ports = {"ours": site.gateway, **site.peers}
    for port in ports.values():
        ask(port, seconds=0.5)  # the first requests are not typical of anyone
    runs: dict[str, list[Loaded]] = {name: [] for name in ports}
    for _ in range(lengths.rounds):
        for name, port in ports.items():
            runs[name].append(ask(port, seconds=lengths.seconds))
    return runs


def _median(runs: Sequence[Loaded], figure: str) -> float:
    return quantile([getattr(run, figure) for run in runs], 0.5)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- what it adds ---


@dataclass(frozen=True, slots=True)
class Streamed:
    """The same streams by three ways: ``new``, for which a lease has to be taken first; ``through`` the gateway with leases that
    it has kept; ``direct``, of the engine.
    """

    new: list[Loaded] = field(default_factory=list)
    through: list[Loaded] = field(default_factory=list)
    direct: list[Loaded] = field(default_factory=list)


def _added(site: Site, lengths: Lengths, settings: Settings) -> Iterator[Row]:
    with _preloads(site.node, settings) as preloads:
        found = {model: _streamed(site, lengths, model) for model in ("steady", "batch")}
    around = f"{STREAMS} streams × {1000 // TOKEN_MS} tokens/s, another pool preloads"
    for model, way, figure, title, goal_ms in (
        ("steady", "through", "first_p99", "to first token, p99", GOAL_FIRST_MS),
        ("steady", "new", "first_p99", "to first token, p99, a lease to be taken", None),
        ("steady", "through", "gap_p99", "between tokens, p99", GOAL_GAP_MS),
        ("batch", "through", "gap_p99", "between tokens, p99, all streams' at the same moments", None),
    ):
        runs: list[Loaded] = getattr(found[model], way)
        with_us, alone = _median(runs, figure), _median(found[model].direct, figure)
        failed = sum(run.failed for run in runs)
        yield Row(
            f"added time {title}; {around}", "ms", with_us - alone, goal="" if goal_ms is None else f"≤ {goal_ms:g} ms",
            reached=None if goal_ms is None else with_us - alone <= goal_ms and not failed,
            note=f"through the gateway {with_us:.2f}, {_DIRECT} {alone:.2f}; {failed} failed; {preloads[0]} preloads meanwhile",
        )  # fmt: skip


def _streamed(site: Site, lengths: Lengths, model: str) -> Streamed:
    """While the engine is asked directly, the gateway gives back the leases that it had kept."""
    found = Streamed()
    ask = functools.partial(site.loads.run, model=model, stream=True, connections=STREAMS, spread_ms=1000)
    for _ in range(lengths.rounds):
        found.direct.append(ask(site.engines[model], seconds=lengths.stream_seconds))
        found.new.append(ask(site.gateway, seconds=1.0))
        found.through.append(ask(site.gateway, seconds=lengths.stream_seconds))
    return found


@contextlib.contextmanager
def _preloads(node: Daemon, settings: Settings) -> Iterator[list[int]]:
    """A pool that is preloaded and stopped again and again, for the time of the block; how often so far."""
    over, count = threading.Event(), [0]
    (port,) = free_ports(1, 14_000)
    node.submit("other", [str(settings.engine()), "--port", str(port), "--load-ms", "1000"], port)
    node.wait_ready(["other"])

    def again() -> None:
        while not over.is_set():
            node.call("POST", "/v1/pools/other/stop?wait=true")
            node.call("POST", "/v1/pools/other/start?wait=true")
            count[0] += 1

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join()


# --- memory ---


def _idle(node: Daemon) -> Row:
    """Of a gateway of its own: what another one had used and freed would hide some of it."""
    with _gateway(node) as (port, pid), contextlib.ExitStack() as stack:
        open_streams = [_open_stream(stack, port) for _ in range(20)]
        before = _memory_mb(pid)
        open_streams += [_open_stream(stack, port) for _ in range(IDLE)]
        added = _memory_mb(pid) - before
        still = sum(_is_open(stream) for stream in open_streams)
    whole = still == len(open_streams)
    return Row(
        f"memory that {IDLE:,} idle streams add to the gateway", "MB", added, goal=f"≤ {GOAL_IDLE_MB:g} MB",
        reached=added <= GOAL_IDLE_MB and whole, note=f"{still} of {len(open_streams)} open, {before:.1f} MB before",
    )  # fmt: skip


def _open_stream(stack: contextlib.ExitStack, port: int) -> socket.socket:
    """A stream that has had its first token."""
    stream = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
    body = json.dumps(chat("silent", stream=True), separators=(",", ":"))
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    stream.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    said = b""
    while b"data: " not in said:
        more = stream.recv(65536)
        if not more:
            raise ConnectionError(f"the gateway opened no stream; it said {said[:500]!r}")
        said += more
    return stream


def _is_open(stream: socket.socket) -> bool:
    stream.setblocking(False)
    try:
        return stream.recv(65536) != b""  # a sign of life
    except BlockingIOError:
        return True
    except OSError:
        return False


def _memory_mb(pid: int) -> float:
    return sum(pss_bytes(one) for one in tree(pid)) / 1e6


@contextlib.contextmanager
def _open_files() -> Iterator[None]:
    """More open files for this process and those that it starts: a gateway needs two for each stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(16_384, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
