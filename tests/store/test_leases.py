"""Leases on disk: what is kept outlives the process, what fails is refused, and nothing of another boot is believed."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from pool_managerd.core.registry import KeptLeases, Lease, LeaseChange, Registry
from pool_managerd.errors import NodeError
from pool_managerd.store.leases import LeaseStore
from tests.conftest import REPOSITORY
from tests.small_disk import fill, mounted_small

told: list[tuple[str, str]] = []
Open = Callable[..., tuple[LeaseStore, Registry, list[KeptLeases]]]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    made: list[LeaseStore] = []
    told.clear()

    def make(boot_id: str = "boot") -> tuple[LeaseStore, Registry, list[KeptLeases]]:
        store = LeaseStore(tmp_path, boot_id)
        made.append(store)
        found = store.open(lambda human, level: told.append((human, level)))
        registry = Registry(lambda: 0, salt="s", on_lease=store.put)
        registry.publish("p", epoch=7, slots_total=4)
        for kept in found:
            registry.restore_leases(kept, {7})
        return store, registry, found

    yield make
    for store in made:
        await store.close()


async def test_leases_go_on_under_the_next_daemon_and_their_ids_too(opened: Open) -> None:
    store, registry, _ = opened()
    first = registry.grant("p", holder="a", given_at_ms=5, key="mine")
    second = registry.grant("p", expires_at=99.5)
    third = registry.grant("p")
    registry.renew("p", second.lease_id, 120.0)
    registry.release("p", third.lease_id)
    await store.kept()
    await store.close()
    store, registry, _ = opened()
    assert registry.leases("p") == [first, Lease(second.lease_id, None, 0, 120.0)]
    assert registry.release("p", third.lease_id) == 2, "its id was given, so giving it back again is no error"
    assert registry.grant("p", key="mine") == first
    fourth = registry.grant("p")
    assert fourth.lease_id not in {first.lease_id, second.lease_id, third.lease_id}
    assert fourth.lease_id.partition("-")[0] == first.lease_id.partition("-")[0]


async def test_leases_of_a_launch_that_did_not_go_on_are_over(opened: Open) -> None:
    store, registry, _ = opened()
    registry.grant("p")
    registry.publish("p", epoch=8)
    await store.kept()
    await store.close()
    store, registry, found = opened()
    assert len(found[0].leases) == 1 and registry.get_active_leases("p") == 1
    registry.publish("p", epoch=9)
    registry.end_leases("p", 7)
    await store.kept()
    await store.close()
    assert opened()[2][0].leases == ()


async def test_nothing_of_another_boot_is_kept(opened: Open) -> None:
    store, registry, _ = opened("one")
    registry.grant("p")
    await store.kept()
    await store.close()
    assert opened("two")[2] == []


async def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    """A process that acknowledges leases as fast as it can is killed: every id that it printed is there."""
    script = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from pool_managerd.core.registry import Registry\nfrom pool_managerd.store.leases import LeaseStore\n"
        "async def main():\n"
        "    store = LeaseStore(Path(sys.argv[1]), 'boot')\n    store.open()\n"
        "    registry = Registry(lambda: 0, salt='s', on_lease=store.put)\n    registry.publish('p', epoch=7)\n"
        "    while True:\n"
        "        lease = registry.grant('p')\n        await store.kept()\n        print(lease.lease_id, flush=True)\n"
        "asyncio.run(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    argv = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        told += [line.strip() for line in process.stdout if line.endswith("\n")]
    store = LeaseStore(tmp_path, "boot")
    (found,) = store.open()
    await store.close()
    assert {lease.lease_id for _, lease in found.leases} >= set(told) and len(told) >= 200


async def test_many_at_once_are_written_together(opened: Open) -> None:
    store, registry, _ = opened()
    registry.publish("p", slots_total=None)

    async def one() -> None:
        registry.grant("p")
        await store.kept()

    await asyncio.gather(*(one() for _ in range(500)))
    await store.close()
    assert len(opened()[2][0].leases) == 500


@pytest.mark.parametrize("harm", ["removed", "replaced", "damaged at the start", "a link"])
async def test_a_file_that_is_harmed_is_begun_anew_from_memory(opened: Open, tmp_path: Path, harm: str) -> None:
    store, registry, _ = opened()
    path = tmp_path / "leases.db"
    kept = registry.grant("p")
    await store.kept()
    if harm == "damaged at the start":
        await store.close()
        path.write_bytes(b"no database" * 100)
        assert opened()[2] == [] and (tmp_path / "leases.db.damaged").exists()
        return
    if harm == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif harm == "removed":
        path.unlink()
    else:
        path.unlink()
        path.write_bytes(b"somebody's own")
    another = registry.grant("p")
    await store.kept()
    await store.close()
    assert not path.is_symlink()
    assert [lease for _, lease in opened()[2][0].leases] == [kept, another]


async def test_what_cannot_be_written_is_refused_and_written_later(opened: Open, tmp_path: Path) -> None:
    store, registry, _ = opened()
    await store.kept()
    tmp_path.rename(tmp_path.with_name("away"))
    lease = registry.grant("p")
    with pytest.raises(NodeError, match="cannot keep leases") as refused:
        await store.kept()
    assert refused.value.code == "STATE_UNWRITABLE" and refused.value.status == 507
    with pytest.raises(NodeError):
        await store.kept()
    assert [level for _, level in told] == ["error"] and "none is given" in told[0][0], "told once"
    tmp_path.with_name("away").rename(tmp_path)
    await store.kept()
    assert [level for _, level in told] == ["error", "info"]
    await store.close()
    assert [kept for _, kept in opened()[2][0].leases] == [lease]


async def test_leases_go_on_when_the_disk_is_full(tmp_path: Path) -> None:
    with mounted_small(tmp_path / "disk", "16m") as disk:
        store = LeaseStore(disk, "boot")
        store.open()
        registry = Registry(lambda: 0, salt="s", on_lease=store.put)
        fill(disk / "filler")
        for _ in range(1000):
            last = registry.grant("p", holder="x" * 200)
            await store.kept()
            registry.release("p", last.lease_id)
            await store.kept()
        for _ in range(500):
            registry.grant("p", holder="x" * 200)
        await store.kept()
        await store.close()
        again = LeaseStore(disk, "boot")
        (found,) = again.open()
        await again.close()
        assert len(found.leases) == 500


async def test_a_newer_file_is_refused_and_not_touched(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "leases.db")) as db:
        db.execute("PRAGMA user_version=99")
    before = (tmp_path / "leases.db").read_bytes()
    with pytest.raises(NodeError, match="newer version") as refused:
        LeaseStore(tmp_path, "boot").open()
    assert refused.value.code == "STATE_TOO_NEW" and (tmp_path / "leases.db").read_bytes() == before


async def test_an_id_that_is_none_is_not_believed(opened: Open, tmp_path: Path) -> None:
    store, _, _ = opened()
    store.put(LeaseChange("p", 7, "../x", Lease("../x"), new=True))
    await store.kept()
    await store.close()
    assert opened()[2] == []
