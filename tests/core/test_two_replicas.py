"""Two replicas of one pool side by side, as while one replaces the other: ledger, owners, ports, files, leases never mix."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.gpu.accounts import Reservation, account
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.gpu.owners import EngineMark, owners
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.registry import Registry
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.errors import NodeError, RequestError
from pool_managerd.runtime.files import RuntimeFiles
from tests.core.gpus import GIB, gpu, process

OLD, NEW = InstanceId("chat"), InstanceId("chat", "r1")
UUID = "GPU-00000000"


def test_each_holds_its_own_memory_and_both_count() -> None:
    ledger, devices = Ledger(), (gpu(0, 24),)
    ledger.reserve(Reservation(OLD, 4, {UUID: 14 * GIB}), account(devices, ledger.all(), {}))
    with pytest.raises(NodeError, match="needs 14 GiB"):
        ledger.reserve(Reservation(NEW, 5, {UUID: 14 * GIB}), account(devices, ledger.all(), {}))
    ledger.reserve(Reservation(NEW, 5, {UUID: 8 * GIB}), account(devices, ledger.all(), {}))
    assert account(devices, ledger.all(), {})[UUID].available_bytes == 2 * GIB
    ledger.release(OLD, 4)
    assert [r.instance_id for r in ledger.all()] == [NEW]


def test_each_owns_the_processes_of_its_own_engine() -> None:
    listed = (process(100, 9, nonce="old"), process(200, 5, nonce="new"), process(201, 1, ancestors=(200, 1)))
    found = owners(listed, [EngineMark(OLD, 4, 100, "old"), EngineMark(NEW, 5, 200, "new")], {})
    assert {pid: owner.instance_id for pid, owner in found.items()} == {100: OLD, 200: NEW, 201: NEW}


def test_each_has_a_port_and_files_of_its_own(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        first = probe.getsockname()[1]
    ports = PortAllocator(f"{first}-{first + 9}")
    assert ports.claim(OLD) != ports.claim(NEW)
    files = RuntimeFiles(tmp_path / "run")
    files.prepare()
    for instance, pid in ((OLD, 100), (NEW, 200)):
        files.write_pid(instance, pid)
        files.write_handoff(PreparedEngine("chat", "/e", replica_id=instance.replica_id), pid, written_at_ms=0)
    assert files.log_path(OLD) != files.log_path(NEW)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*") if path.is_file())
    files.remove_pid(OLD)
    files.remove_handoff(OLD)
    gone = set(before) - {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(gone) == 2 and not any("r1" in name for name in gone)


def test_leases_end_with_the_one_they_were_given_on_and_the_new_one_has_all_its_slots() -> None:
    registry = Registry(clock_ms=lambda: 0, salt="s")
    registry.publish("chat", replica_id="r0", epoch=4, slots_total=1)
    old = registry.grant("chat")
    with pytest.raises(RequestError, match="all 1 slots are in use"):
        registry.grant("chat")
    registry.publish("chat", replica_id="r1", epoch=5, slots_total=1)
    new = registry.grant("chat")
    assert registry.end_leases("chat", 4) == 1
    assert [lease.lease_id for lease in registry.leases("chat")] == [new.lease_id]
    assert registry.release("chat", old.lease_id) == 1, "given back late: idempotent, and nobody else's"
