"""What callers and engines send is kept within bounds, however much of it comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemons import Daemon

LONG = 32_000


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    started = Daemon(open_dir / "d").start()
    yield started
    started.end()


def resident_mib(daemon: Daemon) -> float:
    assert daemon.process is not None
    return int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * 4096 / (1 << 20)


@pytest.mark.parametrize(
    "fields",
    [
        {"binary_path": "/" + "x" * LONG},
        pytest.param({"flags": ["f" * LONG]}, marks=pytest.mark.slow),
        pytest.param({"env": {"A": "v" * LONG}}, marks=pytest.mark.slow),
    ],
    ids=["path", "flag", "variable"],
)
def test_failed_preloads_with_long_texts_do_not_add_up(daemon: Daemon, fields: dict[str, object]) -> None:
    body = {"binary_path": "/nonexistent/engine", "port": 9_000, **fields}
    for number in range(3):
        daemon.post(f"/v1/pools/p{number}/preload", body)
    before = resident_mib(daemon)
    for number in range(900):
        code, answer = daemon.post(f"/v1/pools/p{number % 40}/preload", body)
        assert code in (400, 500)
        assert len(answer["message"]) < 1_000
    assert resident_mib(daemon) - before < 24, "one copy of each text would be 27 MiB"
    assert daemon.log.stat().st_size < 2 << 20
    code, operations = daemon.get("/v1/operations")
    assert code == 200
    assert len(operations) <= 100


def test_all_submitted_engines_together_are_bounded(daemon: Daemon) -> None:
    body = {"binary_path": "/nonexistent/engine", "port": 9_000, "flags": ["f" * 30_000] * 4}
    codes = [daemon.post(f"/v1/pools/p{number}/preload", body)[0] for number in range(80)]
    assert codes.count(500) in range(60, 75)
    assert codes[-1] == 409
    assert daemon.delete("/v1/pools/p0")[0] == 200
    assert daemon.post("/v1/pools/another/preload", body)[0] == 500
