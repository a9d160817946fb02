"""Another daemon takes hold of engines that one left behind when it died: with real processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.errors import EngineError
from pool_managerd.runtime import procfs
from pool_managerd.runtime.adoption import Adoption
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.identity import Identity
from pool_managerd.runtime.records import parse_record
from tests.runtime.support import alive, end, eventually, fake, within
from tests.runtime.test_survivors import leave_survivor

P = InstanceId("p")


def found(root: Path) -> Adoption:
    adoption = Adoption(RuntimeFiles(root), grace_ms=2000)
    adoption.find()
    return adoption


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the one record, as a time, a release or a fault would have."""
    (path,) = (root / "shims").glob("*.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


async def test_a_running_engine_is_adopted_with_its_launch_and_stopped_through_its_shim(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    adoption = found(root)
    left = adoption.left()[P]
    assert (left.launch.epoch, left.launch.argv, left.was_ready, left.exit) == (3, ("/bin/sleep", "60"), False, None)
    assert [Path(stamp.path).name for stamp in left.launch.files] == ["sleep"] and adoption.changed(left.launch) == []
    assert 0 <= procfs.started_at(procfs.start_ticks(os.getpid()) or 0) <= left.started_at
    process = adoption.adopt(P)
    assert (process.pid, process.shim_pid, process.nonce) == (identity.pid, identity.shim_pid, identity.nonce)
    assert adoption.left() == {} and await adoption.clear({P}) == [] and alive(identity.pid)
    process.stop(0)
    record = await within(10, process)
    assert (record.signal, record.stopped_by_us) == (signal.SIGTERM, True)
    assert RuntimeFiles(root).records.all() == []


async def test_an_engine_that_has_erased_its_environment_is_adopted_all_the_same(root: Path) -> None:
    """As a changed process title does: pid and start are its record's, and its living shim is its parent."""
    identity = leave_survivor(root, "/usr/bin/env", "-i", "/bin/sleep", "60")
    await eventually(lambda: procfs.name(identity.pid) == "sleep")
    assert procfs.nonce(identity.pid) is None
    process = found(root).adopt(P)
    process.stop(0)
    assert (await within(10, process)).signal == signal.SIGTERM


async def test_kill_reaches_an_adopted_engine_that_ignores_sigterm(root: Path, engines_run: None) -> None:
    leave_survivor(root, sys.executable, *fake("--ignore-term", "--fork-grandchildren", "2").flags)
    log = RuntimeFiles(root).log_path(InstanceId("p"))
    await eventually(lambda: log.read_bytes().count(b"grandchild ") == 2)
    children = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("grandchild ")]
    process = found(root).adopt(P)
    process.kill()
    assert (await within(10, process)).signal == signal.SIGKILL and not any(map(alive, children))


@pytest.mark.parametrize("code", [0, 7])
async def test_one_that_ended_while_nobody_watched_tells_how(root: Path, code: int) -> None:
    identity = leave_survivor(root, "/bin/sh", "-c", f"sleep 0.2; exit {code}")
    await eventually(lambda: not identity.shim_runs())
    adoption = found(root)
    left = adoption.left()[P].exit
    assert left is not None and left.code == code
    record = await within(5, adoption.adopt(P))
    assert (record.code, record.stopped_by_us) == (code, False)


async def test_one_whose_shim_was_lost_with_it_has_ended_in_an_unknown_way(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    end(identity.shim_pid)
    await eventually(lambda: not alive(identity.pid))
    record = await within(5, found(root).adopt(P))
    assert not record.known


async def test_an_engine_that_lives_on_without_its_shim_is_stopped_and_not_adopted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    monkeypatch.setattr(Identity, "shim_runs", lambda self: False)
    here = found(root)
    assert here.left() == {}
    (survivor,) = await here.clear(set())
    assert (survivor.pool_id, survivor.pid) == ("p", identity.pid) and not alive(identity.pid)
    monkeypatch.undo()
    await eventually(lambda: not identity.shim_runs())


async def test_what_no_pool_wants_any_more_is_stopped_and_its_files_are_gone(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    files = RuntimeFiles(root)
    files.write_pid(InstanceId("p"), identity.pid)
    (survivor,) = await found(root).clear({InstanceId("another")})
    assert survivor.outcome == "stopped" and not alive(identity.pid)
    assert files.records.all() == [] and not files.pid_path(InstanceId("p")).exists()


async def test_files_and_temporaries_of_what_is_adopted_stay(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    files = RuntimeFiles(root)
    for pool in ("p", "q"):
        files.write_pid(InstanceId(pool), identity.pid)
    (temporary,) = (root / "work" / "p").glob("*")
    here = found(root)
    process = here.adopt(P)  # before or after makes no difference
    await here.clear({P})
    assert files.pid_path(InstanceId("p")).exists() and not files.pid_path(InstanceId("q")).exists() and temporary.exists()
    process.kill()
    await within(5, process)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["identity"].update(boot_id="of another boot"),
        lambda record: record["identity"].update(pid=1, shim_pid=1),
        lambda record: record["identity"].update(start_ticks=1, shim_start_ticks=1),
    ],
    ids=["another boot", "pid 1", "reused pids"],
)
async def test_a_record_that_proves_nothing_never_leads_to_a_signal(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    rewrite(root, change)
    rewrite(root, lambda record: record["identity"].update(nonce="e" * 32, uid=0))  # by which it would be found all the same
    here = found(root)
    if P in here.left():  # nothing of it runs, as far as can be proved: how it ended is not known
        assert not (await within(5, here.adopt(P))).known
    await here.clear(set())
    assert alive(identity.pid) and alive(identity.shim_pid)
    end(identity.shim_pid, signal.SIGUSR1)
    await eventually(lambda: not alive(identity.pid))


async def test_an_engine_of_the_first_release_that_wrote_no_launch_down_is_stopped(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    rewrite(root, lambda record: record.pop("launch"))
    here = found(root)
    assert here.left() == {}
    (survivor,) = await here.clear({P})
    assert survivor.outcome == "stopped" and not alive(identity.pid)


async def test_it_runs_since_its_order_and_since_its_process_where_a_release_did_not_write_that_down(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    rewrite(root, lambda record: record.update(began_at=123.5))
    assert found(root).left()[P].started_at == 123.5
    rewrite(root, lambda record: record.pop("began_at"))
    assert abs(found(root).left()[P].started_at - procfs.started_at(identity.start_ticks)) < 0.1
    end(identity.shim_pid, signal.SIGUSR1)
    await eventually(lambda: not alive(identity.pid))


async def test_an_engine_can_be_adopted_once(root: Path) -> None:
    leave_survivor(root, "/bin/sleep", "60")
    here = found(root)
    process = here.adopt(P)
    with pytest.raises(EngineError, match="none was left"):
        here.adopt(P)
    process.kill()
    await within(5, process)


async def test_of_two_launches_of_one_pool_the_newer_one_is_its_engine(root: Path) -> None:
    older = leave_survivor(root, "/bin/sleep", "60")
    rewrite(root, lambda record: record["identity"].update(epoch=2))
    (old_path,) = (root / "shims").glob("*.json")
    kept = old_path.read_bytes()
    old_path.unlink()
    newer = leave_survivor(root, "/bin/sleep", "61")
    old_path.write_bytes(kept)
    here = found(root)
    (survivor,) = await here.clear({P})
    assert survivor.pid == older.pid and not alive(older.pid) and alive(newer.pid)
    process = here.adopt(P)
    assert process.pid == newer.pid
    process.kill()
    await within(5, process)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "records").glob("*.json")), ids=lambda path: path.stem)
def test_an_engine_that_an_earlier_version_launched_can_be_adopted(path: Path) -> None:
    record = parse_record(json.loads(path.read_text()), "/elsewhere")
    assert record.launch is not None and record.identity.pid > 1
    engine = record.launch.engine_as_shown()
    assert (engine.pool_id, engine.url, engine.slots_total) == ("chat", "http://127.0.0.1:8080", 4)
    assert record.launch.reserved_bytes and record.launch.log_mark and engine.argv[0].startswith("/")
