"""Operations outlive the daemon, and none of them runs for ever."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError
from pool_managerd.store.journal import Journal
from pool_managerd.supervision.operations import KEPT, Operations


def opened(directory: Path, name: str = "op") -> tuple[Operations, Journal]:
    journal = Journal(directory)
    journal.open(lambda _human, _level: None)
    ids = count(1)
    operations = Operations(lambda: f"{name}-{next(ids)}", lambda: 5, journal)
    operations.restore()
    return operations, journal


async def test_what_became_of_an_operation_can_be_asked_of_the_next_daemon(tmp_path: Path) -> None:
    first, journal = opened(tmp_path)
    done, failed, refused, running = (first.begin("preload", "p") for _ in range(4))
    first.finish(done, {"pool_id": "p", "pid": 7})
    first.finish(failed, error=EngineError("preload failed: it fell", hint="look"))
    first.discard(refused)
    told = [done.to_dict(), failed.to_dict()]
    assert running.to_dict()["status"] == "running"
    await journal.close()
    second, journal = opened(tmp_path)
    assert [operation.to_dict() for operation in second.all()][:2] == told
    assert await second.get(done.operation_id).wait() == {"pool_id": "p", "pid": 7}
    with pytest.raises(PoolError, match="it fell"):
        await second.get(failed.operation_id).wait()
    with pytest.raises(RequestError):
        second.get(refused.operation_id)
    assert running.to_dict() == second.get(running.operation_id).to_dict()
    second.resume(lambda operation: False)
    with pytest.raises(PoolError, match="the daemon ended before it was finished") as caught:
        await second.get(running.operation_id).wait()
    assert isinstance(caught.value, NodeError) and caught.value.code == "NODE_RESTARTED" and "status p" in str(caught.value.hint)
    unfinished = second.get(running.operation_id).to_dict()
    await journal.close()
    third, journal = opened(tmp_path)
    assert third.get(running.operation_id).to_dict() == unfinished
    await journal.close()


async def test_one_that_goes_on_has_its_end_under_the_next_daemon(tmp_path: Path) -> None:
    first, journal = opened(tmp_path)
    running = first.begin("drain", "p", "drained")
    await journal.close()
    second, journal = opened(tmp_path)
    second.resume(lambda operation: operation.goal == "drained")
    again = second.get(running.operation_id)
    assert again.status == "running"
    second.finish(again, {"pool_id": "p"})
    assert await again.wait() == {"pool_id": "p"}
    await journal.close()


async def test_they_are_bounded_on_disk_as_in_memory(tmp_path: Path) -> None:
    first, journal = opened(tmp_path)
    running = first.begin("drain", "p")
    for _ in range(KEPT + 20):
        first.finish(first.begin("start", "p"), {})
    kept = [operation.operation_id for operation in first.all()]
    assert len(kept) == KEPT and running.operation_id in kept
    await journal.close()
    second, journal = opened(tmp_path, "later")
    assert [operation.operation_id for operation in second.all()] == kept
    await journal.close()


async def test_what_is_no_operation_of_ours_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.open(lambda _human, _level: None)
    for body in ({}, {"operation_id": "x", "kind": "start", "pool_id": "p", "started_at_ms": 1, "error": 3, "status": "failed"}):
        journal.put_operation(str(len(body)), body)
    await journal.close()
    second, journal = opened(tmp_path)
    assert second.all() == []
    await journal.close()
