"""Reading an engine's log: its end, through rotation, in bounded memory, and without the pools' secrets."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pool_managerd.telemetry.engine_log import CHUNK_BYTES, MAX_TAIL_BYTES, EngineLog
from tests.api.conftest import LIMITS, Served, close, serve
from tests.api.fake_node import FakeNode


def read(path: Path, lines: int, redact: str = "\0") -> bytes:
    return b"".join(EngineLog(path, lambda text: text.replace(redact, "***")).past(lines))


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\nc\n", b"a\nb\nc", b"a" * 200_000 + b"\nb\n", b"ab\n" * 100_000])
def test_the_end_of_a_log_is_its_last_lines(tmp_path: Path, content: bytes, lines: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    wanted = content.removesuffix(b"\n").split(b"\n")[-lines:] if lines else []
    assert read(path, lines).replace(b"\n", b"") == b"".join(wanted)


def test_lines_that_the_newest_part_lacks_come_from_the_part_before(tmp_path: Path) -> None:
    (tmp_path / "log.1").write_bytes(b"oldest\nolder\n")
    (tmp_path / "log").write_bytes(b"new\n")
    assert read(tmp_path / "log", 2) == b"older\nnew\n"
    assert read(tmp_path / "log", 9) == b"oldest\nolder\nnew\n"


def test_no_more_than_a_few_megabytes_are_read_however_long_the_lines_are(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.truncate(3 * MAX_TAIL_BYTES)
        file.seek(0, 2)
        file.write(b"\nend\n")
    chunks = EngineLog(tmp_path / "log", lambda text: text).past(10_000)
    total = sum(len(chunk) // 4 for chunk in chunks)  # a NUL is shown as \x00
    assert total <= MAX_TAIL_BYTES + CHUNK_BYTES


def test_a_secret_is_masked_where_two_pieces_of_the_file_meet(tmp_path: Path) -> None:
    for shift in (3, 8, 40):
        line = b"x" * 99 + b"\n"
        lines = line * ((CHUNK_BYTES // 100) - 1)
        filler = b"y" * (CHUNK_BYTES - len(lines) - shift) + b" my-secret-value and more\n"
        (tmp_path / "log").write_bytes(lines + filler + line * 10)
        assert b"secret" not in read(tmp_path / "log", 10_000, "my-secret-value")


def test_what_is_appended_is_shown_up_to_the_end_of_a_line_and_masked(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old\n")
    log = EngineLog(path, lambda text: text.replace("hidden", "***"))
    assert b"".join(log.past(0)) == b""
    with path.open("ab") as file:
        file.write(b"one\nhid")
    assert log.appended() == b"one\n"
    with path.open("ab") as file:
        file.write(b"den\n")
    assert log.appended() == b"***\n"


@pytest.fixture
async def crowded(tmp_path: Path) -> AsyncIterator[Served]:
    streams = dataclasses.replace(LIMITS.streams, max_streams=64, write_timeout_s=1.0)
    node = FakeNode()
    node.log_file = tmp_path / "engine.log"
    node.log_file.write_bytes((b"y" * 1_023 + b"\n") * 10_000)
    served = await serve(
        node,
        limits=dataclasses.replace(
            LIMITS, streams=streams, http=dataclasses.replace(LIMITS.http, head_timeout_s=1.0, write_timeout_s=1.0)
        ),
    )
    yield served
    await close(served)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def test_sixty_who_ask_for_ten_thousand_lines_and_read_none_cost_almost_nothing(crowded: Served) -> None:
    before, peak = resident_bytes(), 0
    readers: list[socket.socket] = []
    for _ in range(60):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        reader.connect(("127.0.0.1", crowded.port))
        reader.sendall(b"GET /v1/pools/demo/logs?lines=10000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        readers.append(reader)
    deadline = time.monotonic() + 20
    while crowded.server.connections and time.monotonic() < deadline:
        peak = max(peak, resident_bytes())
        await asyncio.sleep(0.02)
    for reader in readers:
        reader.close()
    assert crowded.server.connections == 0, "who takes nothing is cut off"
    assert peak - before < 40 << 20
    async with crowded.session.get(crowded.url + "/v1/pools/demo/logs?lines=2") as response:
        assert len(await response.read()) == 2 * 1_024


async def test_who_takes_nothing_of_a_plain_answer_is_cut_off(crowded: Served) -> None:
    for number in range(500):
        crowded.node.add(f"pool-{number}", last_error="e" * 10_000)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        reader.connect(("127.0.0.1", crowded.port))
        reader.sendall(b"GET /v1/pools HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(10):
            while not crowded.server.connections:
                await asyncio.sleep(0.01)
            while crowded.server.connections:
                await asyncio.sleep(0.02)


def test_a_log_is_read_from_a_place_and_to_one_through_a_rotation(tmp_path: Path) -> None:
    older, newer = tmp_path / "log.1", tmp_path / "log"
    older.write_bytes(b"first\nsecond\n")
    newer.write_bytes(b"third\nfourth\n")
    old, new = older.stat().st_ino, newer.stat().st_ino

    def window(begin: tuple[int, int] | None, end: tuple[int, int] | None = None, lines: int = 99) -> bytes:
        return b"".join(EngineLog(newer, lambda text: text).past(lines, begin, end))

    assert window((new, 6)) == b"fourth\n"
    assert window((old, 6)) == b"second\nthird\nfourth\n"
    assert window((old, 0), (old, 6)) == b"first\n"
    assert window((old, 6), (new, 6)) == b"second\nthird\n"
    assert window((old, 0), (new, 6), lines=1) == b"third\n"
    assert window(None, (old, 13)) == b"first\nsecond\n"
    assert window((new, 13)) == b"" == window((new, 0), lines=0)
    assert window((1, 0)) == b"first\nsecond\nthird\nfourth\n" == window((0, 0), (1, 5)), "places that are no more bound nothing"
    assert window((new, 9_999)) == b"", "it was cut by somebody"


def test_a_place_goes_on_without_a_gap_or_a_repetition(tmp_path: Path) -> None:
    older, newer = tmp_path / "log.1", tmp_path / "log"
    older.write_bytes(b"first\nsecond\n" + b"x" * CHUNK_BYTES + b"\n")
    newer.write_bytes(b"third\nfourth\n")
    whole = EngineLog(newer, lambda text: text)
    pieces = list(whole.past(100))
    for count in range(1, len(pieces) + 1):
        first = EngineLog(newer, lambda text: text)
        given = [chunk for _, chunk in zip(range(count), first.past(100), strict=False)]
        again = EngineLog(newer, lambda text: text)
        assert b"".join([*given, *again.behind(first.place)]) == b"".join(pieces)
    with newer.open("ab") as file:
        file.write(b"fifth\nhalf")
    assert whole.appended() == b"fifth\n"
    again = EngineLog(newer, lambda text: text)
    assert b"".join(again.behind(whole.place)) == b"half\n"
    inode = newer.stat().st_ino
    assert b"".join(again.behind((inode, 15))) == b"fifth\nhalf\n", "no line is cut, nor a secret in it"
    assert b"".join(again.behind((older.stat().st_ino, 100))).startswith(b"x" * 100 + b"xx"), "nor from the part before"
    older.write_bytes(b"x" * 3 * CHUNK_BYTES)
    assert len(b"".join(again.behind((older.stat().st_ino, 2 * CHUNK_BYTES))).partition(b"\n")[0]) < 2 * CHUNK_BYTES
    newer.write_bytes(b"new\n")
    assert b"".join(again.behind((inode, 15))) == b"new\n", "it was truncated: all of it is new"
