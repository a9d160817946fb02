from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.runtime import procfs
from pool_managerd.runtime.engine_users import UserRules
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.identity import Identity
from pool_managerd.runtime.launcher import LaunchOptions
from pool_managerd.runtime.strays import kill_strays
from pool_managerd.runtime.survivors import stop_survivors
from tests.runtime.support import DEADLINE_SECONDS, Bench, alive, end, eventually, fake, sh, within

# A daemon that holds a lock and a port, starts an engine, and dies without any clean-up.
_DOOMED_DAEMON = """
import asyncio, fcntl, os, socket, sys
from pathlib import Path
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from pool_managerd.runtime.spawner import Spawner

async def main(root, binary, *flags):
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    listener = socket.create_server(("127.0.0.1", 0))
    (root / "port").write_text(str(listener.getsockname()[1]))
    spawner = Spawner()
    launcher = Launcher(spawner, RuntimeFiles(root), LaunchOptions(profile="dev"))
    await launcher.launch(PreparedEngine("p", binary, flags), epoch=3, grace_ms=2000)
    os._exit(9)

asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
"""


def leave_survivor(root: Path, *argv: str) -> Identity:
    """Run a daemon that dies with one engine running; returns the engine's identity."""
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", _DOOMED_DAEMON, str(root), *argv],
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 9, done.stderr
    (record,) = RuntimeFiles(root).records.all()
    return record.identity


def forkserver_of(identity: Identity) -> bool:
    shim = procfs.stat(identity.shim_pid)
    return shim is not None and procfs.name(shim.parent_pid) == "pm-forkserver"


def start_alone(nonce: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["/bin/sleep", "60"], env={"POOL_MANAGERD_NONCE": nonce})


async def stopped(identity: Identity, grace_ms: int = 2000) -> tuple[str, str]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        (survivor,) = await stop_survivors([identity], grace_ms)
    assert survivor.identity == identity
    return survivor.outcome, survivor.human


async def test_an_engine_outlives_its_daemon_and_the_next_one_stops_it(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    assert identity.engine_runs()
    assert identity.shim_runs()
    outcome, human = await stopped(identity)
    assert outcome == "stopped"
    assert human == f"Engine of pool 'p' (pid {identity.pid}): it was stopped"
    assert not alive(identity.pid)
    record = RuntimeFiles(root).records.of(identity).exit
    assert record is not None
    assert (record.signal, record.stopped_by_us) == (signal.SIGTERM, True)


async def test_a_dead_daemons_locks_and_ports_are_free_while_its_engine_runs(root: Path) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    try:
        lock = os.open(root / "lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        with socket.create_server(("127.0.0.1", int((root / "port").read_text()))):
            assert identity.engine_runs()
        await eventually(lambda: not forkserver_of(identity))
    finally:
        await stopped(identity)


async def test_a_survivor_that_ignores_sigterm_is_killed_after_the_new_grace(root: Path, engines_run: None) -> None:
    identity = leave_survivor(root, sys.executable, "-I", "-S", fake("").flags[2], "--ignore-term", "--fork-grandchildren", "2")
    log = RuntimeFiles(root).log_path(InstanceId("p"))
    await eventually(lambda: b"listens" in log.read_bytes())
    grandchildren = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("grandchild")]
    outcome, human = await stopped(identity, grace_ms=200)
    assert outcome == "killed"
    assert "did not end within 200 ms" in human
    assert not [pid for pid in (identity.pid, *grandchildren) if alive(pid)]


async def test_a_suspended_shim_is_no_obstacle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = leave_survivor(root, "/bin/sleep", "60")
    end(identity.shim_pid, signal.SIGSTOP)
    assert (await stopped(identity))[0] == "stopped"
    assert not alive(identity.shim_pid)


async def test_what_a_lost_shim_left_behind_is_found_by_its_nonce(bench: Bench) -> None:
    process = await bench.launch(fake("--fork-grandchildren", "2", "--setsid"))
    grandchildren = await bench.grandchildren(2)
    process.close()
    await bench.spawner.close()  # as if the daemon were dead: its fork server would see to them at once
    end(process.identity.shim_pid)
    await eventually(lambda: not alive(process.pid))
    assert all(alive(pid) for pid in grandchildren)
    outcome, human = await stopped(process.identity)
    assert outcome == "killed"
    assert "left 2 processes behind" in human
    await eventually(lambda: not [pid for pid in grandchildren if alive(pid)])


# Leaves the session, changes its group, wipes what /proc shows of its environment, and closes the engine's output.
_ERASED = """
import os, signal, sys
if os.fork():
    os._exit(0)
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.execve("/bin/sleep", ["VLLM::EngineCore", "60"], {})
"""


def with_an_erased_grandchild() -> PreparedEngine:
    start = f"{sys.executable} -I -S -c '{_ERASED}' >&- 2>&-; exec sleep 60"
    return PreparedEngine("p", "/bin/sh", ("-c", start))


async def erased_grandchild_of(shim_pid: int) -> int:
    def found() -> list[int]:
        return [pid for pid in procfs.children(shim_pid) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"VLLM")]

    await eventually(found)
    return found()[0]


async def test_a_grandchild_that_erased_every_mark_dies_with_its_lost_shim(bench: Bench) -> None:
    process = await bench.launch(with_an_erased_grandchild())
    child = await erased_grandchild_of(process.identity.shim_pid)
    assert procfs.nonce(child) is None
    assert os.getsid(child) == child
    end(process.identity.shim_pid)
    await within(3, process)
    await eventually(lambda: not alive(child))


@pytest.mark.parametrize("user", [None, "daemon"])
async def test_the_next_daemon_ends_a_grandchild_that_erased_every_mark_too(bench: Bench, user: str | None) -> None:
    """By the pool's own uid where it has one, else by what the shim wrote down."""
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can change users")
    process = await bench.launch(with_an_erased_grandchild(), options=LaunchOptions(UserRules(user=user)))
    child = await erased_grandchild_of(process.identity.shim_pid)
    records = bench.files.records
    if process.identity.uid == 0:
        await eventually(lambda: (child, procfs.start_ticks(child)) in records.of(process.identity).descendants)
    process.close()
    await bench.spawner.close()
    end(process.identity.shim_pid)
    await eventually(lambda: not alive(process.pid))
    assert alive(child)
    assert (await stopped(process.identity))[0] == "killed"
    await eventually(lambda: not alive(child))


async def test_another_launch_of_the_pool_is_left_alone(bench: Bench) -> None:
    lost = await bench.launch(sh("exec sleep 60"))
    other = await bench.launch(with_an_erased_grandchild(), epoch=2)
    child = await erased_grandchild_of(other.identity.shim_pid)
    end(lost.identity.shim_pid)
    await within(3, lost)
    assert await kill_strays(lost.identity) == []
    assert alive(other.pid)
    assert alive(child)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("doubt", ["owner", "mode", "directory"])
async def test_a_record_that_another_user_could_have_written_is_not_believed(bench: Bench, doubt: str) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    (path,) = (bench.root / "shims").glob("*.json")
    assert len(bench.files.records.all()) == 1
    if doubt == "owner":
        os.chown(path, 65534, 65534)
    else:
        (path if doubt == "mode" else path.parent).chmod(0o777)
    files = bench.files
    files.prepare()
    assert files.records.all() == []
    assert alive(process.pid)
    os.chown(path, 0, 0)
    path.chmod(0o600)


async def test_a_process_without_a_nonce_needs_another_proof(bench: Bench) -> None:
    unrelated = subprocess.Popen(["/bin/sleep", "60"], env={}, start_new_session=True)
    try:
        template = (await bench.launch(sh("exit 0"))).identity
        ticks = procfs.start_ticks(unrelated.pid) or 0
        identity = dataclasses.replace(template, pid=unrelated.pid, start_ticks=ticks, shim_pid=0, nonce="d" * 32)
        outcome, human = await stopped(identity)
        assert outcome == "not ours"
        assert "nothing proves" in human
        assert unrelated.poll() is None
    finally:
        unrelated.kill()
        unrelated.wait()


async def test_an_engine_without_a_shim_is_stopped_directly(bench: Bench) -> None:
    nonce = "c" * 32
    engine = start_alone(nonce)
    try:
        template = (await bench.launch(sh("exit 0"))).identity
        identity = dataclasses.replace(
            template, pid=engine.pid, start_ticks=procfs.start_ticks(engine.pid) or 0, nonce=nonce, shim_pid=engine.pid
        )
        assert (await stopped(identity))[0] == "stopped"
        assert engine.wait(5) == -signal.SIGTERM
    finally:
        engine.kill()
        engine.wait()


async def is_asleep(pid: int) -> None:
    """In the moment of an exec the kernel shows no environment, which is no mismatch: wait until the last exec is over."""
    name = Path(f"/proc/{pid}/comm")
    await eventually(lambda: name.read_text().strip() == "sleep" and procfs.nonce(pid) is not None)


@pytest.mark.parametrize(
    "change",
    [
        {"start_ticks": 1, "shim_start_ticks": 1},
        {"boot_id": "another boot"},
        {"nonce": "f" * 32, "shim_pid": 1, "shim_start_ticks": 1},
        {"pid": 1, "shim_pid": 1},
        {"pid": 0, "shim_pid": 0},
        {"pid": -1, "shim_pid": -1},
        {"pid": 1 << 22, "shim_pid": 1 << 22},
    ],
)
async def test_whatever_does_not_match_is_never_signalled(bench: Bench, change: dict[str, object]) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    await is_asleep(process.pid)
    harmless = {"nonce": "e" * 32} if "nonce" not in change else {}
    identity = dataclasses.replace(process.identity, **{**harmless, **change})  # type: ignore[arg-type]
    outcome, human = await stopped(identity)
    assert outcome in ("gone", "not ours")
    assert human
    assert alive(process.pid)
    assert process.identity.shim_runs()


async def test_a_pid_that_another_process_has_now_is_said_to_be_so(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    identity = dataclasses.replace(process.identity, start_ticks=1, shim_start_ticks=1, nonce="e" * 32)
    outcome, human = await stopped(identity)
    assert outcome == "gone"
    assert "its pid is another process's now" in human


async def test_another_engines_mark_means_not_ours(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    await is_asleep(process.pid)
    identity = dataclasses.replace(process.identity, nonce="e" * 32, shim_pid=0)
    assert (await stopped(identity))[0] == "not ours"


def test_an_identity_survives_json() -> None:
    identity = Identity("n", 2, 3, "b", 4, 5, "p", "r0", 6, "/run/x.json")
    assert Identity.from_json({**dataclasses.asdict(identity), "of a later version": 1}) == identity


@pytest.mark.parametrize("wrong", [{"pid": "2"}, {"pid": True}, {"pid": None}, {"nonce": 5}])
def test_a_damaged_identity_is_refused(wrong: dict[str, object]) -> None:
    identity = Identity("n", 2, 3, "b", 4, 5, "p", "r0", 6, "/run/x.json")
    with pytest.raises(ValueError, match="cannot use an instance record"):
        Identity.from_json({**dataclasses.asdict(identity), **wrong})
