"""Log lines: the keys of the contract, no secrets, and a stuck or closed reader that hurts nobody (FAULTS I5)."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from pool_managerd.core.redaction import MASK, Redactor
from pool_managerd.telemetry.logs import Logging, LogOptions, configure_logging, correlation_id
from pool_managerd.telemetry.sink import LogSink

SECRET = "canary-0123456789-0123456789-0123456789"
Start = Callable[..., Logging]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Configured logging into a file; structlog and the root logger are put back afterwards."""
    root, before = logging.getLogger(), (logging.getLogger().handlers[:], logging.getLogger().level)
    opened: list[Logging] = []

    def begin(**options: Any) -> Logging:
        with (tmp_path / "log").open("w") as stream:
            opened.append(configure_logging(LogOptions("1.2.3", **options), stream))
        return opened[-1]

    yield begin
    for output in opened:
        output.close()
    structlog.reset_defaults()
    root.handlers[:], level = before
    root.setLevel(level)


def lines(output: Logging, tmp_path: Path) -> list[dict[str, Any]]:
    output.close()
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def event(type_: str, human: str = "It happened", *, level: str = "info", journal: bool = True, **fields: Any) -> Any:
    return SimpleNamespace(
        type=type_, human=human, level=level, ts_ms=1_795_000_000_123, pool_id="p", fields=fields, journal=journal
    )


def test_a_crash_line_has_its_fields_at_the_top_level(start: Start, tmp_path: Path) -> None:
    output = start(labels={"node_id": "n1"})
    output.log_event(event("crash", level="error", engine_version="b1", uptime_seconds=2.5, exit_code=139, crash_count=3))
    (line,) = lines(output, tmp_path)
    assert line["ts"].endswith(".123Z")
    del line["ts"]
    assert line == {
        "level": "error", "service": "pool-managerd", "version": "1.2.3", "emitted_by": "pool-managerd@1.2.3",
        "actor": "pool-managerd", "action": "crash", "target": "p", "pool_id": "p", "human": "It happened",
        "engine_version": "b1", "uptime_seconds": 2.5, "exit_code": 139, "crash_count": 3, "node_id": "n1",
    }  # fmt: skip


def test_what_only_metrics_count_and_what_is_below_the_level_is_not_logged(start: Start, tmp_path: Path) -> None:
    output = start()
    output.log_event(event("probe", journal=False))
    output.log_event(event("transition", level="debug"))
    output.log_event(event("spawn"))
    assert [line["action"] for line in lines(output, tmp_path)] == ["spawn"]


def test_structlog_and_the_standard_library_come_out_in_the_same_form(start: Start, tmp_path: Path) -> None:
    output = start()
    token = correlation_id.set("req-1")
    try:
        structlog.get_logger("x").warning("Something is odd", action="oddity", pool_id="p", size=3)
        logging.getLogger("aiohttp.server").error("broken %s", "pipe")
        try:
            raise ValueError("inner")
        except ValueError:
            structlog.get_logger("x").exception("It failed")
    finally:
        correlation_id.reset(token)
    odd, broken, failed = lines(output, tmp_path)
    assert (odd["level"], odd["action"], odd["pool_id"], odd["size"], odd["correlation_id"]) == (
        "warn",
        "oddity",
        "p",
        3,
        "req-1",
    )
    assert (broken["level"], broken["human"], broken["logger"]) == ("error", "broken pipe", "aiohttp.server")
    assert "ValueError: inner" in failed["exception"]


def test_no_secret_reaches_a_line_by_value_or_by_name(start: Start, tmp_path: Path) -> None:
    output = start()
    output.redactor.know("auth", [SECRET])
    output.write("info", "x", f"Using {SECRET}", "p", {
        "argv": ["--key", SECRET], "nested": {"deep": [{"Authorization": "Bearer abc"}]}, "HF_TOKEN": "hf_abc",
        "db_password": "pw",
        "api-key": "k", "tokens_per_s": 12.5, "first_token_ms": 3, "token_file": "/etc/token", "token_fp6": "abc123",
    })  # fmt: skip
    structlog.get_logger("x").info(f"Hello {SECRET}")
    output.close()
    text = (tmp_path / "log").read_text()
    for hidden in (SECRET, "hf_abc", "Bearer abc", '"pw"', '"k"'):
        assert hidden not in text
    line = json.loads(text.splitlines()[0])
    assert (line["tokens_per_s"], line["first_token_ms"], line["token_file"], line["token_fp6"]) == (
        12.5,
        3,
        "/etc/token",
        "abc123",
    )
    assert line["human"] == f"Using {MASK}"


def test_values_of_any_kind_are_written_without_failing(start: Start, tmp_path: Path) -> None:
    output = start()
    loop: dict[str, Any] = {}
    loop["self"] = loop
    output.write(
        "info",
        "x",
        "a\nb\x1b[31m\ud800",
        "p",
        {"path": Path("/x"), "set": {1}, "loop": loop, "bytes": b"\xff", "nan": float("nan")},
    )
    output.write("info", "x", "y" * 1000, "p")
    output.close()
    first, second = (tmp_path / "log").read_text().splitlines()
    assert json.loads(first)["path"] == "/x"
    assert json.loads(first)["nan"] == "nan"
    assert len(json.loads(second)["human"]) == 160
    assert json.loads(second)["message"] == "y" * 1000


def test_the_readable_form_is_for_terminals_and_cannot_be_steered_by_what_it_shows(start: Start, tmp_path: Path) -> None:
    output = start(format="pretty")
    output.write("error", "crash", "It fell\x1b[2J", "p", {"last_error": "bad\x07thing"})
    output.close()
    text = (tmp_path / "log").read_text()
    assert "It fell" in text
    assert "last_error=bad" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_the_readable_form_says_a_long_error_whole_and_once(start: Start, tmp_path: Path) -> None:
    output, error = start(format="pretty"), "cannot use the model: " + "x" * 300
    output.write("error", "preload_failed", f"Pool 'p' could not start: {error}", "p", {"last_error": error, "duration_ms": 7})
    output.close()
    text = (tmp_path / "log").read_text()
    assert text.count(error) == 1 and "last_error" not in text and "…" not in text and "duration_ms=7" in text


def test_a_library_that_says_the_same_a_thousand_times_is_heard_once_a_second(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("pool_managerd.telemetry.logs.time.monotonic", lambda: now[0])
    output, said = start(), logging.getLogger("asyncio")
    for _ in range(1_000):
        said.error("socket.accept() out of system resource")
    said.error("something else")
    said.error("socket.accept() out of system resource")
    now[0] += 0.5
    said.error("socket.accept() out of system resource")
    now[0] += 0.6
    said.error("socket.accept() out of system resource")
    found = lines(output, tmp_path)
    assert [line["human"] for line in found] == [
        "socket.accept() out of system resource", "something else", *["socket.accept() out of system resource"] * 2,
    ]  # fmt: skip
    assert [line.get("repeated") for line in found] == [None, None, None, 1]


def test_a_reader_that_is_stuck_costs_lines_and_not_time() -> None:
    reader, writer = os.pipe()
    sink = LogSink(writer, max_lines=10)
    began = time.monotonic()
    for _ in range(500):
        sink.write("x" * 10_000)
    assert time.monotonic() - began < 1
    os.set_blocking(reader, False)
    received = b""
    deadline = time.monotonic() + 5
    while b'"action":"log_dropped"' not in received and time.monotonic() < deadline:
        sink.write("again")
        try:
            received += os.read(reader, 1 << 20)
        except BlockingIOError:
            time.sleep(0.005)
    (dropped,) = [json.loads(line)["lines"] for line in received.splitlines() if b'"action":"log_dropped"' in line]
    assert dropped > 300
    os.close(reader)
    sink.close(1)
    os.close(writer)


def test_closing_does_not_wait_for_a_reader_that_is_stuck() -> None:
    reader, writer = os.pipe()
    sink = LogSink(writer, max_lines=5)
    for _ in range(50):
        sink.write("x" * 100_000)
    began = time.monotonic()
    sink.close(0.2)
    assert time.monotonic() - began < 2
    os.close(reader)
    os.close(writer)


def test_a_closed_reader_does_not_hurt() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sink = LogSink(writer)
    for _ in range(10):
        sink.write("nobody reads")
    sink.close(1)
    sink.write("still fine")
    os.close(writer)


def test_a_short_word_is_no_secret() -> None:
    assert Redactor(("a",)).text("banana") == "banana"
