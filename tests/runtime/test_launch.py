from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import record_of
from pool_managerd.errors import EngineError, NodeError
from pool_managerd.runtime import isolation, procfs, wire
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from tests.runtime.support import Bench, alive, end, eventually, fake, sh, within


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def mode(path: Path | str) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def command(pid: int) -> bytes:
    try:
        return read(f"/proc/{pid}/cmdline")
    except OSError:
        return b""


async def test_the_exit_code_is_recorded(bench: Bench) -> None:
    record = await bench.run(sh("exit 7"))
    assert (record.code, record.signal, record.stopped_by_us) == (7, None, False)
    assert record.known
    assert record.max_rss_bytes > 100_000
    assert 0 < record.started_at_ms <= record.ended_at_ms


async def test_a_clean_exit_is_code_zero(bench: Bench) -> None:
    assert (await bench.run(sh("exit 0"))).code == 0


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
async def test_a_signal_from_outside_is_recorded(bench: Bench, number: signal.Signals) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    end(process.pid, number)
    record = await within(5, process)
    assert (record.code, record.signal, record.stopped_by_us) == (None, number, False)


async def test_the_pid_is_the_engines_own_and_it_leads_its_session(bench: Bench) -> None:
    process = await bench.launch(sh("echo pid $$; exec sleep 60"))
    await bench.says(f"pid {process.pid}\n")
    assert os.getsid(process.pid) == process.pid
    assert os.getpgid(process.pid) == process.pid
    assert process.identity.engine_runs()
    assert process.identity.shim_runs()
    assert procfs.name(process.identity.shim_pid) == "pm-shim"
    assert process.pid != process.identity.shim_pid


async def test_flags_reach_the_engine_in_order_and_unchanged(bench: Bench) -> None:
    flags = ("--b", "a b", "", "$HOME", "--a=ü", "--a=ü")
    await bench.run(PreparedEngine("p", "/bin/sh", ("-c", 'printf "[%s]" "$@"', "sh", *flags)))
    assert bench.log().decode() == "[--b][a b][][$HOME][--a=ü][--a=ü]"


async def test_stdin_is_empty_and_nothing_else_is_open(bench: Bench) -> None:
    await bench.run(sh("cat; ls /proc/self/fd"))
    # 3 is ls reading the directory.
    assert bench.log() == b"0\n1\n2\n3\n"


async def test_the_environment_does_not_leak_secrets(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTH_TOKEN", "NVIDIA_API_KEY", "HF_TOKEN", "LD_PRELOAD_NOT"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("CUDA_CACHE_PATH", "/cache")
    process = await bench.launch(sh("env", env={"MINE": "yes", "POOL_MANAGERD_NONCE": "forged"}))
    await within(5, process)
    log = bench.log().decode()
    assert "canary" not in log
    assert "MINE=yes\n" in log
    assert "CUDA_CACHE_PATH=/cache\n" in log
    assert f"HOME={bench.root}/work/p\n" in log
    assert f"POOL_MANAGERD_NONCE={process.identity.nonce}\n" in log
    if os.geteuid() == 0:  # nobody else may look
        assert read(f"/proc/{bench.spawner.pid}/environ") == b""


async def test_the_engine_works_in_a_directory_of_its_own(bench: Bench) -> None:
    await bench.run(sh("pwd; touch mine"))
    assert bench.log().decode().strip() == f"{bench.root}/work/p"
    assert mode(bench.root / "work/p") == 0o700


async def test_no_core_file_can_be_written_and_signals_are_as_after_boot(bench: Bench) -> None:
    process = await bench.launch(sh("ulimit -c; exec sleep 60"))
    await bench.says("0\n")
    status = procfs.status(process.pid) or {}
    # 32 and 33 are the C library's own: whoever was started by posix_spawn inherits them ignored, and nobody can set them.
    ours = ~(0b11 << 31)
    assert int(status["SigIgn"], 16) & ours == int(status["SigBlk"], 16) & ours == 0


async def test_the_log_is_appended_to_and_keeps_raw_bytes(bench: Bench) -> None:
    bench.files.log_path(InstanceId("p")).write_bytes(b"from before\n")
    await bench.run(sh(r"printf '\000\377\033[31mred\r\n'; echo err >&2"))
    assert bench.log() == b"from before\n\x00\xff\x1b[31mred\r\nerr\n"


async def test_a_very_long_line_without_an_end_is_kept(bench: Bench) -> None:
    await bench.run(sh("head -c 3000000 /dev/zero"))
    assert bench.log() == bytes(3_000_000)


async def test_output_above_the_rate_is_dropped_counted_and_marked(bench: Bench) -> None:
    options = LaunchOptions(profile="dev", log_bytes_per_second=200_000)
    record = await bench.run(sh("head -c 30000000 /dev/zero; echo; echo last"), options=options)
    size = len(bench.log())
    assert record.code == 0
    assert size < 2_000_000
    assert record.log_bytes_dropped > 20_000_000
    assert b"bytes of output were dropped here]" in bench.log()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "it is a directory"),
        (lambda path: path.write_text("#!/bin/sh\n"), "it is not executable"),
        (lambda path: (path.write_text("#!/no/such/shell\n"), path.chmod(0o755)), "interpreter or loader"),
        (lambda path: (path.write_bytes(b"\x7fELF nonsense"), path.chmod(0o755)), "no program for this machine"),
    ],
)
async def test_a_binary_that_cannot_run_is_explained(bench: Bench, root: Path, make: object, reason: str) -> None:
    binary = root / "engine"
    make(binary)  # type: ignore[operator]
    with pytest.raises(EngineError, match="preload failed: cannot run") as caught:
        await bench.launch(PreparedEngine("p", str(binary)))
    assert reason in caught.value.message
    assert caught.value.hint
    assert caught.value.code == "PRELOAD_FAILED"
    assert bench.files.records.all() == []


async def test_a_bare_name_is_looked_up_on_path(bench: Bench) -> None:
    assert (await bench.run(PreparedEngine("p", "sh", ("-c", "exit 3")))).code == 3


async def test_a_link_in_place_of_the_log_is_refused(bench: Bench, root: Path) -> None:
    target = root / "precious"
    target.write_text("keep me")
    bench.files.log_path(InstanceId("p")).symlink_to(target)
    with pytest.raises(EngineError, match="is a link or no regular file"):
        await bench.launch(sh("echo overwritten"))
    assert target.read_text() == "keep me"


async def test_a_fifo_in_place_of_the_log_is_refused_at_once(bench: Bench) -> None:
    os.mkfifo(bench.files.log_path(InstanceId("p")))
    with pytest.raises(EngineError, match="is a link or no regular file"):
        await bench.launch(sh("exit 0"))


async def test_a_link_in_place_of_the_records_is_refused(bench: Bench, root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "shims").symlink_to(root / "elsewhere")
    with pytest.raises(NodeError, match="cannot use"):
        await bench.launch(sh("exit 0"))


async def test_while_it_runs_a_private_record_says_who_it_is(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"), epoch=5)
    (record,) = bench.files.records.all()
    assert record.identity == process.identity
    assert record.identity.epoch == 5
    assert record.exit is None
    path = process.identity.record_path
    assert mode(path) == 0o600
    assert mode(bench.root / "shims") == 0o700
    assert json.loads(read(path))["schema_version"] == wire.RECORD_VERSION


async def test_the_record_says_what_was_launched_without_its_secrets(bench: Bench) -> None:
    engine = sh("exec sleep 60", port=8080, env={"HF_TOKEN": "hf_secret"}, device_uuids=("GPU-1",))
    launcher = Launcher(bench.spawner, bench.files, LaunchOptions(profile="dev"))
    bench.files.prepare()
    bench.files.log_path(InstanceId("p")).write_bytes(b"before")
    process = await launcher.launch(engine, epoch=5, grace_ms=100, reserved_bytes={"GPU-1": 42}, decided_at_ms=7)
    bench.started.append(process)
    (record,) = bench.files.records.all()
    launch = record.launch
    assert launch is not None and launch.order_at_ms > 7
    expected = record_of(
        engine,
        epoch=5,
        reserved_bytes={"GPU-1": 42},
        log_mark=launch.log_mark,
        decided_at_ms=7,
        order_at_ms=launch.order_at_ms,
        files=launch.files,
    )
    assert launch == expected and list(launch.log_mark.values()) == [6] and [stamp.path for stamp in launch.files] == ["/bin/sh"]
    assert b"hf_secret" not in Path(process.identity.record_path).read_bytes()
    process.kill()
    await within(5, process)


async def test_two_replicas_of_a_pool_run_side_by_side(bench: Bench) -> None:
    first = await bench.launch(sh("echo first; exec sleep 60"))
    second = await bench.launch(sh("echo second; exec sleep 60", replica_id="r1"), epoch=2)
    one, two = InstanceId("p"), InstanceId("p", "r1")
    await eventually(lambda: (bench.files.tail_log(one), bench.files.tail_log(two)) == (["first"], ["second"]))
    records = {record.launch.instance: record for record in bench.files.records.all() if record.launch is not None}
    assert {instance: record.identity.pid for instance, record in records.items()} == {one: first.pid, two: second.pid}
    second.kill()
    assert (await within(5, second)).signal == signal.SIGKILL
    await eventually(lambda: [record.identity.pid for record in bench.files.records.all()] == [first.pid])
    assert alive(first.pid)


async def test_a_record_of_the_first_version_is_read_and_one_of_a_later_version_is_refused(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    path = Path(process.identity.record_path)
    now = json.loads(path.read_bytes())
    first = {key: value for key, value in now.items() if key != "launch"} | {"schema_version": 1}
    for content, launched in ((first, False), ({**now, "launch": {"schema_version": 1}}, False), (now, True)):
        path.write_text(json.dumps(content))
        (record,) = bench.files.records.all()
        assert record.identity == process.identity and (record.launch is not None) == launched
    for content in ({**now, "schema_version": 3}, {**now, "launch": {**now["launch"], "schema_version": 2}}):
        path.write_text(json.dumps(content))
        assert bench.files.records.all() == [], "nobody is to be signalled on its word"
    assert alive(process.pid)


async def test_the_record_is_gone_once_it_was_read(bench: Bench) -> None:
    process = await bench.launch(sh("exit 0"))
    first, second = await asyncio.gather(within(5, process), within(5, process))
    assert first == second == await process.wait()
    await eventually(lambda: names(bench.root / "shims") == [])


async def test_a_crash_is_known_before_the_shim_has_cleared_away_and_a_stop_when_it_has(bench: Bench) -> None:
    """What is cleared away belongs to that launch alone; a stop is over when nothing is left."""
    fill = 'mkdir -p "$TMPDIR/x"; cd "$TMPDIR/x"; seq 20000 | xargs touch; echo filled; exec sleep 60'
    crashed = await bench.launch(sh(fill))
    await bench.says("filled")
    end(crashed.pid)
    assert (await within(20, crashed)).signal == signal.SIGKILL
    assert alive(crashed.shim_pid)
    stopped = await bench.launch(sh(fill, pool_id="q"), epoch=2)
    await bench.says("filled", "q")
    stopped.kill()
    await within(20, stopped)
    assert not alive(stopped.shim_pid)
    await eventually(lambda: not alive(crashed.shim_pid))


async def test_the_same_launch_again_is_not_judged_anew_until_a_file_of_it_changes(
    bench: Bench, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []
    choose = isolation.choose

    def judge(engine: PreparedEngine, *rest: Any) -> isolation.Choice:
        judged.append(engine.pool_id)
        return choose(engine, *rest)

    monkeypatch.setattr(isolation, "choose", judge)
    binary = root / "engine"
    binary.write_text("#!/bin/sh\nexit 3\n")
    binary.chmod(0o755)
    engine = PreparedEngine("p", str(binary))
    launcher = Launcher(bench.spawner, bench.files, LaunchOptions(profile="dev"))

    async def code(epoch: int) -> int | None:
        return (await within(5, await launcher.launch(engine, epoch=epoch, grace_ms=1000))).code

    assert [await code(1), await code(2)] == [3, 3]
    assert judged == ["p"]
    binary.chmod(0o700)  # when the daemon is root its engines do not reach it any more
    with suppress(EngineError):
        await code(3)
    binary.chmod(0o755)
    assert await code(4) == 3
    assert judged == ["p"] * 3


async def test_a_caller_that_gives_up_waiting_does_not_spoil_the_record_for_others(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    impatient = asyncio.create_task(process.wait())
    patient = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    impatient.cancel()
    process.kill()
    assert (await patient).signal == signal.SIGKILL
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_a_cancelled_launch_leaves_nothing_running(bench: Bench) -> None:
    await bench.spawner.start()
    for turns in range(12):
        launch = asyncio.create_task(bench.launch(sh("exec sleep 61")))
        for _ in range(turns):
            await asyncio.sleep(0)
        launch.cancel()
        await asyncio.gather(launch, return_exceptions=True)
        if not launch.cancelled():
            launch.result().kill()
    await bench.run(sh("exit 0"))  # the fork server works in order: now it has seen all the others
    server = bench.spawner.pid or 0
    await eventually(lambda: not procfs.children(server))
    assert not [pid for pid in procfs.pids() if b"sleep\x0061" in command(pid) and alive(pid)]


async def test_the_outcome_is_known_although_the_record_cannot_be_written(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    shutil.rmtree(bench.root / "shims")
    end(process.pid, signal.SIGSEGV)
    assert (await within(5, process)).signal == signal.SIGSEGV


@pytest.mark.usefixtures("as_root")
async def test_a_disk_that_fills_up_costs_neither_engine_nor_outcome(full_disk: Callable[[], None], bench: Bench) -> None:
    process = await bench.launch(sh("while :; do echo line; sleep 0.01; done"))
    await bench.says("line")
    full_disk()
    size = len(bench.log())
    assert alive(process.pid)
    end(process.pid)
    assert (await within(5, process)).signal == signal.SIGKILL
    assert len(bench.log()) - size < 4096
    await eventually(lambda: bench.files.records.all() == [] and not alive(process.shim_pid))
    full_disk()  # the record that was read has made a little room
    with pytest.raises((EngineError, NodeError), match="No space left on device"):
        await bench.launch(sh("exit 0", pool_id="q"))


async def test_waiting_for_what_is_no_longer_watched_is_refused(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    process.close()
    process.close()
    with pytest.raises(RuntimeError, match="no longer watched"):
        await process.wait()
    assert alive(process.pid)
    end(process.pid)


async def test_many_launches_at_once_all_arrive(bench: Bench) -> None:
    processes = await asyncio.gather(*(bench.launch(sh(f"exit {n}", pool_id=f"p{n}")) for n in range(20)))
    records = await asyncio.gather(*(process.wait() for process in processes))
    assert [record.code for record in records] == list(range(20))


async def test_descriptors_are_given_back(bench: Bench) -> None:
    for _ in range(2):  # the second one takes the shim that was forked in advance
        await bench.run(sh("exit 0"))
    before = len(names(Path("/proc/self/fd")))
    for _ in range(5):
        await bench.run(sh("exit 0"))
    await eventually(lambda: len(names(Path("/proc/self/fd"))) <= before + 1)  # the next shim in advance


async def test_a_replaced_binary_does_not_disturb_the_running_engine(bench: Bench, root: Path) -> None:
    binary = root / "engine"
    binary.write_bytes(read("/bin/sleep"))
    binary.chmod(0o755)
    process = await bench.launch(PreparedEngine("p", str(binary), ("60",)))
    (root / "new").write_text("#!/bin/sh\nexit 9\n")
    (root / "new").chmod(0o755)
    (root / "new").rename(binary)
    assert alive(process.pid)
    assert (await bench.run(PreparedEngine("p", str(binary), ("60",)), epoch=2)).code == 9


async def test_the_scripted_engine_ends_before_it_binds_when_told(bench: Bench) -> None:
    record = await bench.run(fake("--exit-after", "0", "--exit-code", "3", "--model", "ignored"))
    assert record.code == 3
    assert "gives up at once" in bench.files.tail_log(InstanceId("p"))[-1]
