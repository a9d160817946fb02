"""Models on their way: hashed, copied and fetched, beside the programs that do nothing else; what a resume and a header cost."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from yarl import URL

from bench.fleet import Settings
from bench.processes import end
from bench.result import NotInstalledError, Row, quantile
from pool_managerd.config import PolicyConfig
from pool_managerd.models import importing
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.hub_access import HubAccess
from pool_managerd.models.importing import Importer, import_of
from pool_managerd.models.refs import parse_ref
from pool_managerd.models.room import Room
from pool_managerd.models.web import Web, trusting

GOAL_SHARE, GOAL_BLOCKED_MS, GOAL_GROWN_MB = 0.9, 20.0, 64.0
GOAL_HEADER_REQUESTS, GOAL_HEADER_MB = 4, 16.0
_LARGE_BYTES, _VOCABULARY_MB = 40 << 30, 7
_LOOK_S = 0.001


def measure(settings: Settings) -> Iterator[Row]:
    for program in ("openssl", "curl", "cp"):
        if shutil.which(program) is None:
            raise NotInstalledError(f"{program} is not installed")
    folder = settings.directory / "models"
    folder.mkdir()
    size, rounds = (128 << 20, 2) if settings.quick else (1 << 30, 5)
    file = _model(folder / "m.gguf", size)
    (sum_, *_) = _run("openssl", "dgst", "-sha256", "-r", str(file)).split()
    yield from asyncio.run(_local(file, size, folder, rounds))
    with _server(folder) as server:
        yield from asyncio.run(_fetched(server, folder, sum_, size, rounds))
        yield from asyncio.run(_header(server, folder))


# --- on this machine ---


async def _local(file: Path, size: int, folder: Path, rounds: int) -> list[Row]:
    copy, cache, wanted = folder / "copy.gguf", folder / "imported", import_of(str(file), "m")

    async def digest() -> None:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await DigestCache().sha256(fd)
        finally:
            os.close(fd)

    async def imported() -> None:
        importer = Importer(ModelCache(cache), Room(cache, 0), DigestCache())
        await importer.run(wanted, _nobody)

    def copied() -> None:
        _run("cp", "--reflink=never", str(file), str(copy))
        _run("sync", str(copy))

    def clear() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        copy.unlink(missing_ok=True)

    clone = importing._clone
    importing._clone = lambda source, target: False
    try:
        hashing = await _in_turns(rounds, digest, lambda: _run("openssl", "dgst", "-sha256", str(file)), lambda: None)
        copying = await _in_turns(rounds, imported, copied, clear)
    finally:
        importing._clone = clone
    what = f"of a local file of {size >> 20} MiB"
    return [
        *_rows(f"digest {what}", "openssl dgst", size, hashing),
        *_rows(f"import {what}, copied, hashed and on the disk", "cp and sync", size, copying),
    ]


# --- from a server on loopback ---


@dataclass
class _Server:
    url: str
    ca: Path
    trusted: ssl.SSLContext | None
    _said: IO[bytes]

    def answer(self) -> tuple[int, int]:
        """The next one: the first byte that was asked for, how many were sent."""
        first, sent = self._said.readline().split()
        return int(first), int(sent)


@contextmanager
def _server(folder: Path) -> Iterator[_Server]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    named = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    _run("openssl", "req", "-x509", *kind, *named, "-keyout", str(key), "-out", str(cert))
    argv = [sys.executable, "-m", "bench.model_server", str(folder), str(cert), str(key)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield _Server(f"https://127.0.0.1:{int(process.stdout.readline())}", cert, trusting(cert), process.stdout)
    finally:
        end(process)
        process.stdout.close()


def _fetcher(server: _Server, cache: Path) -> Fetcher:
    policy = PolicyConfig(allow_network=True, allow_schemes=("https",), allow_domains=("127.0.0.1",))
    web = Web(lambda: policy, HubAccess(URL(server.url)), tls=server.trusted)
    return Fetcher(ModelCache(cache), web, 0, DigestCache())


async def _fetched(server: _Server, folder: Path, sha256: str, size: int, rounds: int) -> list[Row]:
    cache, ref = folder / "cache", f"{server.url}/m.gguf"

    async def fetch() -> None:
        fetcher = _fetcher(server, cache)
        try:
            await fetcher.fetch(parse_ref(ref), (f"sha256:{sha256}",), _nobody)
        finally:
            await fetcher.close()
        server.answer()

    def curl() -> None:
        got = subprocess.Popen(["curl", "-s", "--cacert", str(server.ca), ref], stdout=subprocess.PIPE)
        found = subprocess.run(["openssl", "dgst", "-sha256", "-r"], stdin=got.stdout, capture_output=True, text=True, check=True)
        if got.wait() != 0 or not found.stdout.startswith(sha256):
            raise RuntimeError("curl has brought another file")
        server.answer()

    rows = _rows(
        f"https download of {size >> 20} MiB from loopback, hashed, on the disk", "curl | openssl dgst", size,
        await _in_turns(rounds, fetch, curl, lambda: shutil.rmtree(cache, ignore_errors=True)),
    )  # fmt: skip
    return [*rows, await _resumed(server, cache, ref, sha256, size)]


async def _resumed(server: _Server, cache: Path, ref: str, sha256: str, size: int) -> Row:
    """Cancelled in the middle, gone on with."""
    middle, fetcher = asyncio.Event(), _fetcher(server, cache)
    fetching = asyncio.ensure_future(
        fetcher.fetch(parse_ref(ref), (f"sha256:{sha256}",), lambda done, _: middle.set() if done > size // 2 else None)
    )
    await asyncio.wait_for(middle.wait(), 120)
    fetching.cancel()
    await asyncio.wait([fetching])
    await fetcher.close()
    (part,) = (cache / "partial").glob("*.part")
    there = part.stat().st_size
    server.answer()
    fetcher = _fetcher(server, cache)
    await fetcher.fetch(parse_ref(ref), (f"sha256:{sha256}",), _nobody)
    await fetcher.close()
    first, sent = server.answer()
    again = there - first
    return Row(
        "bytes that a resumed download fetches again", "bytes", again, goal="0", reached=again == 0 and sent == size - there,
        note=f"{there >> 20} MiB were there, {sent >> 20} MiB came",
    )  # fmt: skip


async def _header(server: _Server, folder: Path) -> list[Row]:
    large = folder / "large.gguf"
    large.write_bytes(_header_of(_LARGE_BYTES, _VOCABULARY_MB))
    os.truncate(large, _LARGE_BYTES)  # with nothing behind its header on the disk
    fetcher = _fetcher(server, folder / "ahead")
    try:
        remote = await fetcher.look(parse_ref(f"{server.url}/large.gguf"))
        began = time.monotonic()
        ahead = await fetcher.read_ahead(remote)
        took_ms = (time.monotonic() - began) * 1000
    finally:
        await fetcher.close()
        large.unlink()
    assert ahead.shape is not None, ahead
    answers = [server.answer()]
    while sum(sent for _, sent in answers) < _VOCABULARY_MB * 1_000_000:
        answers.append(server.answer())
    megabytes, what = sum(sent for _, sent in answers) / 1e6, f"a model of 40 GiB with a vocabulary of {_VOCABULARY_MB} MB"
    return [
        Row(
            f"requests for the header of {what}", "", len(answers), goal=f"≤ {GOAL_HEADER_REQUESTS}",
            reached=len(answers) <= GOAL_HEADER_REQUESTS, note=f"{took_ms:.0f} ms",
        ),
        Row("what is sent for them", "MB", megabytes, goal=f"≤ {GOAL_HEADER_MB:g} MB", reached=megabytes <= GOAL_HEADER_MB),
    ]  # fmt: skip


# --- ours and theirs in turns ---


@dataclass
class _Turns:
    """Seconds of each; how late the event loop was at most, and how long it worked without a pause; by how much this process was
    larger than before.
    """

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    late_ms: float = 0.0
    own_ms: float = 0.0
    grown_mb: float = 0.0


async def _in_turns(
    rounds: int, ours: Callable[[], Awaitable[None]], theirs: Callable[[], object], clear: Callable[[], None]
) -> _Turns:
    """A round to warm up, then ``rounds`` of both, each first in turn; ``clear`` comes before each."""
    turns = _Turns()
    for number in range(-1, rounds):
        for mine in (True, False) if number % 2 else (False, True):
            clear()
            os.sync()
            took = await _timed(ours, turns) if mine else await asyncio.to_thread(_seconds, theirs)
            if number >= 0:
                (turns.ours if mine else turns.theirs).append(took)
    clear()
    return turns


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


async def _timed(work: Callable[[], Awaitable[None]], turns: _Turns) -> float:
    began, before, doing = time.monotonic(), _rss_mb(), asyncio.ensure_future(_ended(work()))
    loop, looks = asyncio.get_running_loop(), 0
    while not doing.done():
        due, worked, looks = loop.time() + _LOOK_S, time.thread_time(), looks + 1
        await asyncio.sleep(_LOOK_S)
        turns.own_ms = max(turns.own_ms, (time.thread_time() - worked) * 1000)
        turns.late_ms = max(turns.late_ms, (loop.time() - due) * 1000)
        if looks % 20 == 0:
            turns.grown_mb = max(turns.grown_mb, _rss_mb() - before)
    return await doing - began


async def _ended(work: Awaitable[None]) -> float:
    await work
    return time.monotonic()


def _rows(what: str, other: str, size: int, turns: _Turns) -> list[Row]:
    ours, theirs = (size / quantile(seconds, 0.5) / 1e6 for seconds in (turns.ours, turns.theirs))
    late, grown, rounds = turns.late_ms, turns.grown_mb, len(turns.ours)
    return [
        Row(
            f"{what}, p50", "MB/s", ours, other, theirs, f"≥ {GOAL_SHARE:g} of it", ours / theirs >= GOAL_SHARE,
            f"{rounds} rounds in turns",
        ),
        Row(
            "the event loop is late meanwhile, at most", "ms", late, goal=f"≤ {GOAL_BLOCKED_MS:g} ms",
            reached=late <= GOAL_BLOCKED_MS, note=f"its thread worked for {turns.own_ms:.1f} ms between two turns at most",
        ),
        Row(
            "the process is larger meanwhile, at most", "MB", grown, goal=f"≤ {GOAL_GROWN_MB:g} MB",
            reached=grown <= GOAL_GROWN_MB,
        ),
    ]  # fmt: skip


def _rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def _nobody(_done: int, _total: int) -> None:
    """Nobody wants to know how far it is."""


def _model(path: Path, size: int) -> Path:
    """A GGUF model of ``size`` bytes; nothing in it is twice within a block."""
    head, block = _header_of(size, 0.1), os.urandom(16 << 20)
    with path.open("wb") as file:
        file.write(head)
        while file.tell() < size:
            file.write(block[: size - file.tell()])
    return path


def _header_of(size: int, vocabulary_mb: float) -> bytes:
    """The header of a model of ``size`` bytes: one tensor, and a vocabulary of so many megabytes."""
    text, key, name = b"x" * 200, b"tokenizer.ggml.tokens", b"blk.0.attn_q.weight"
    count = int(vocabulary_mb * 1_000_000) // (len(text) + 8)
    strings = (struct.pack("<Q", len(text)) + text) * count
    rows = (size - len(strings) - (1 << 16)) // 4096 // 2
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 4096, rows, 1, 0)
    return struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, len(key)) + key + struct.pack("<IIQ", 9, 8, count) + strings + tensor
