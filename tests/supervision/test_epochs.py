"""Epochs never go back, over restarts and kills of the daemon."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pool_managerd.core.epochs import BLOCK
from pool_managerd.errors import NodeError
from pool_managerd.store.state import StateStore
from pool_managerd.supervision.epochs import FLOOR, KIND, Epochs
from pool_managerd.testing.fake_parts import FakeRecords
from tests.conftest import REPOSITORY

_LAUNCHER = """
import asyncio, pathlib, sys
from pool_managerd.store.state import StateStore
from pool_managerd.supervision.epochs import Epochs

async def main():
    store = StateStore(pathlib.Path(sys.argv[1]))
    store.open()
    epochs = Epochs(store)
    epochs.restore()
    epoch = epochs.first("p")
    while True:
        epoch += 1
        await epochs.reserve("p", epoch)
        print(epoch, flush=True)

asyncio.run(main())
"""


class Counting(FakeRecords):
    """Counts the writes; with ``full`` none can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.full = False

    async def put_fact(self, kind: str, key: str, value: object) -> None:
        if self.full:
            raise NodeError("cannot write")
        self.writes += 1
        await super().put_fact(kind, key, value)  # type: ignore[arg-type]


def test_a_killed_daemon_used_no_epoch_that_the_next_one_uses(tmp_path: Path) -> None:
    last = 0
    for _ in range(3):
        argv, env = [sys.executable, "-c", _LAUNCHER, str(tmp_path)], {"PYTHONPATH": str(REPOSITORY / "src")}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, env=env) as launcher:
            assert launcher.stdout is not None
            epochs = [int(launcher.stdout.readline()) for _ in range(250)]
            launcher.send_signal(signal.SIGKILL)
            launcher.stdout.read()
        assert epochs == list(range(epochs[0], epochs[0] + 250)) and epochs[0] > last
        last = epochs[-1]


async def test_a_block_is_reserved_at_a_time_and_comes_back(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.open()
    epochs = Epochs(store)
    epochs.restore()
    await epochs.reserve("p", epochs.first("p") + 1)
    await epochs.reserve("q", 7)
    await epochs.forget("q")
    await store.close()
    again = StateStore(tmp_path)
    again.open()
    assert again.facts(KIND) == {"p": {"limit": BLOCK}, FLOOR: {"limit": 6 + BLOCK}}
    later = Epochs(again)
    later.restore()
    assert (later.first("p"), later.first("q"), later.first("new")) == (6 + BLOCK, 6 + BLOCK, 6 + BLOCK)
    await again.close()


async def test_what_cannot_be_written_is_not_reserved_and_a_pool_that_cannot_be_forgotten_is_remembered() -> None:
    facts = Counting()
    epochs = Epochs(facts)
    for epoch in range(1, BLOCK + 1):
        await epochs.reserve("p", epoch)
    assert facts.writes == 1
    facts.full = True
    for call in (epochs.reserve("p", BLOCK + 1), epochs.forget("p")):
        with pytest.raises(NodeError):
            await call
    assert epochs.first("p") == BLOCK and epochs.first("q") == 0
    facts.full = False
    await epochs.forget("p")
    await epochs.forget("never there")
    assert facts.known[KIND] == {FLOOR: {"limit": BLOCK}} and epochs.first("p") == BLOCK
