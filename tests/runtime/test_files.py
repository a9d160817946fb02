from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.narration import printable
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.runtime.files import RuntimeFiles

ENGINE = PreparedEngine(
    "pool-0",
    "/bin/engine",
    ("--model", "m.gguf"),
    port=8080,
    model_path="/m.gguf",
    model_id="file:m.gguf",
    engine_version="v1",
    provisioning_mode="source",
    device_mask="0,1",
    slots_total=4,
)

P, P0 = InstanceId("p"), InstanceId("pool-0")


@pytest.fixture
def files(tmp_path: Path) -> RuntimeFiles:
    return RuntimeFiles(tmp_path / "run")


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_launch_is_judged_where_every_engine_may_enter_whatever_the_umask(files: RuntimeFiles) -> None:
    """Two first launches at once: one was told that ``work`` may not be entered, for the other had just made it."""
    before = os.umask(0o077)
    try:
        files.prepare_launch()
    finally:
        os.umask(before)
    assert mode(files.root / "work") == 0o755


def test_the_directories_are_made_with_their_modes_whatever_the_umask(files: RuntimeFiles) -> None:
    before = os.umask(0o077)
    try:
        files.prepare()
    finally:
        os.umask(before)
    assert {name: mode(files.root / name) for name in ("", "engines", "shims", "work")} == {
        "": 0o755,
        "engines": 0o755,
        "shims": 0o700,
        "work": 0o755,
    }


def test_a_pid_file_holds_digits_only_and_goes_when_told(files: RuntimeFiles) -> None:
    files.write_pid(P0, 4711)
    assert files.pid_path(P0).read_text() == "4711"
    files.remove_pid(P0)
    files.remove_pid(P0)
    assert not files.pid_path(P0).exists()


def test_the_handoff_names_what_readers_look_for_and_is_copied(files: RuntimeFiles) -> None:
    copy = files.write_handoff(ENGINE, 4711, written_at_ms=5)
    assert copy == files.root / "engines" / "engine.json"
    own = files.root / "engines" / "pool-0-r0.json"
    assert own.read_bytes() == copy.read_bytes()
    assert own.read_text().startswith('{\n  "schema_version": 1,\n')
    content = json.loads(own.read_text())
    assert (
        content
        | {
            "pool_id": "pool-0",
            "replica_id": "r0",
            "url": "http://127.0.0.1:8080",
            "engine": "llamacpp",
            "engine_version": "v1",
            "provisioning_mode": "source",
            "pid": 4711,
            "model": {"id": "file:m.gguf", "path": "/m.gguf"},
            "flags": ["--model", "m.gguf"],
            "device_mask": "0,1",
            "slots_total": 4,
            "slots_free": 4,
            "written_at_ms": 5,
        }
        == content
    )


def test_the_copy_goes_with_the_replica_that_it_is_about_and_no_other(files: RuntimeFiles) -> None:
    files.write_handoff(ENGINE, 1, written_at_ms=5)
    other = PreparedEngine("pool-1", "/bin/engine")
    files.write_handoff(other, 2, written_at_ms=6)
    files.remove_handoff(InstanceId("pool-0", "r0"))
    assert names(files.root / "engines") == ["engine.json", "pool-1-r0.json"]
    files.remove_handoff(InstanceId("pool-1", "r0"))
    assert names(files.root / "engines") == []


@pytest.mark.parametrize("pool_id", ["../x", "a/b", "", ".hidden", "a" * 64, "a..b", "a\0b", "a\n"])
def test_a_name_that_could_leave_the_directory_is_refused(files: RuntimeFiles, pool_id: str) -> None:
    for use in (files.pid_path, files.log_path, files.remove_pid, files.tail_log, files.handoff_path):
        for instance in (InstanceId(pool_id), InstanceId("p", pool_id)):
            with pytest.raises(SpecError, match="cannot use"):
                use(instance)


def write_pid(files: RuntimeFiles) -> None:
    files.write_pid(P, 4711)


def write_handoff(files: RuntimeFiles) -> None:
    files.write_handoff(PreparedEngine("p", "/bin/engine"), 4711, written_at_ms=0)


@pytest.mark.parametrize(
    ("name", "write"), [("p.pid", write_pid), ("engines/p-r0.json", write_handoff), ("engines/engine.json", write_handoff)]
)
def test_nothing_is_written_through_a_planted_link(
    files: RuntimeFiles, tmp_path: Path, name: str, write: Callable[[RuntimeFiles], None]
) -> None:
    files.prepare()
    target = tmp_path / "precious"
    target.write_text("keep me")
    (files.root / name).symlink_to(target)
    with pytest.raises(NodeError, match="is a link or no regular file") as caught:
        write(files)
    assert caught.value.hint
    assert target.read_text() == "keep me"


@pytest.mark.parametrize("name", ["engines", "work", "shims"])
def test_a_link_in_place_of_a_directory_is_refused(files: RuntimeFiles, tmp_path: Path, name: str) -> None:
    files.root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (files.root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NodeError, match="cannot use"):
        files.prepare()


def test_a_link_in_place_of_a_working_directory_is_refused(files: RuntimeFiles) -> None:
    files.prepare()
    (files.root / "work" / "p").symlink_to("/etc")
    with pytest.raises(NodeError, match="cannot use"):
        files.workdir("p", os.getuid(), os.getgid())


def test_the_operators_own_link_to_the_runtime_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    RuntimeFiles(tmp_path / "run").write_pid(P, 7)
    assert (tmp_path / "disk" / "p.pid").read_text() == "7"


def test_a_predecessors_files_are_forgotten_and_other_peoples_kept(files: RuntimeFiles) -> None:
    files.write_pid(P0, 1)
    files.write_handoff(ENGINE, 1, written_at_ms=5)
    external = files.root / "engines" / "other.json"
    external.write_text('{"pool_id": "other", "url": "http://127.0.0.1:1"}')
    (files.root / "engines" / ".x.1.2.tmp").write_text("half")
    (files.root / "shims" / ".x.1.2.tmp").parent.mkdir()
    (files.root / "shims").chmod(0o700)
    files.remove_stale()
    assert names(files.root / "engines") == ["other.json"]
    assert not files.pid_path(P0).exists()


def test_the_log_tail_is_the_last_lines_safe_to_show(files: RuntimeFiles) -> None:
    files.prepare()
    files.log_path(P).write_bytes(b"one\ntwo\r\n\n\x1b[31mred\x00\xff\tx\nlast\xe2\x80\xae")
    assert files.tail_log(P, max_lines=3) == [
        "two",
        "\\x1b[31mred\\x00\N{REPLACEMENT CHARACTER}    x",
        "last\\u202e",
    ]


def test_the_log_tail_is_bounded_in_bytes_and_leaves_out_a_cut_line(files: RuntimeFiles) -> None:
    files.prepare()
    files.log_path(P).write_bytes(b"x" * 100_000 + b"\nend\n")
    assert files.tail_log(P, max_bytes=100) == ["end"]
    files.log_path(P).write_bytes(b"y" * 100_000)
    assert files.tail_log(P, max_bytes=100) == ["y" * 100]


def test_the_log_tail_reaches_into_the_part_that_was_just_rotated(files: RuntimeFiles) -> None:
    files.prepare()
    files.log_path(P).with_suffix(".log.1").write_bytes(b"older\nold\n")
    files.log_path(P).write_bytes(b"new\n")
    assert files.tail_log(P) == ["older", "old", "new"]


def test_a_launchs_log_begins_where_it_was_launched(files: RuntimeFiles) -> None:
    files.prepare()
    log = files.log_path(P)
    log.write_bytes(b"first launch: CUDA error\n")
    mark = files.log_mark(P)
    assert files.launch_log(P, mark).lines == ()
    with log.open("ab") as more:
        more.write(b"10%\r90%\r\x1b[31msecond launch\x1b[0m\n")
    found = files.launch_log(P, mark)
    assert (found.lines, found.offsets) == (("second launch",), (0,))
    with log.open("ab") as more:
        more.write(b"\n\nthird line\n")
    found = files.launch_log(P, mark)
    assert found.lines[1:] == ("third line",)
    assert log.read_bytes()[mark[log.stat().st_ino] + found.offsets[1] :] == b"third line\n"


def test_a_launchs_log_goes_on_behind_a_rotation(files: RuntimeFiles) -> None:
    files.prepare()
    log = files.log_path(P)
    log.write_bytes(b"before\n")
    mark = files.log_mark(P)
    with log.open("ab") as more:
        more.write(b"one\n")
    log.rename(log.with_suffix(".log.1"))
    log.write_bytes(b"two\n")
    assert files.launch_log(P, mark).lines == ("one", "two")
    assert files.launch_log(P, mark).offsets == (0, 4)


def test_of_a_launchs_long_log_both_ends_are_read(files: RuntimeFiles) -> None:
    files.prepare()
    files.log_path(P).write_bytes(b"cause\n" + b"x\n" * 1_000_000 + b"end\n")
    log = files.launch_log(P, {})
    found = log.lines
    assert log.offsets[-1] == len(b"cause\n" + b"x\n" * 1_000_000)
    assert (found[0], found[-1]) == ("cause", "end") and len(found) < 200_000


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 131_072, 196_607, 196_608, 196_609])
def test_of_a_launchs_log_no_byte_is_read_twice(files: RuntimeFiles, size: int) -> None:
    files.prepare()
    text = "".join(f"{number:07}\n" for number in range(size // 8 + 1))[:size]
    files.log_path(P).write_text("older\n" + text)
    found = list(files.launch_log(P, {files.log_path(P).stat().st_ino: 6}).lines)
    whole = [line for line in text.split("\n") if line]
    assert found == whole if size <= 196_608 else len(found) <= len(whole) + 1


def test_no_log_and_a_planted_one_have_no_tail(files: RuntimeFiles) -> None:
    files.prepare()
    assert files.tail_log(P) == []
    files.log_path(P).symlink_to("/etc/passwd")
    assert files.tail_log(P) == []
    files.log_path(InstanceId("q")).mkdir()
    assert files.tail_log(InstanceId("q")) == []


def test_two_replicas_have_their_own_files_and_r0_has_the_names_that_are_documented(files: RuntimeFiles) -> None:
    files.prepare()
    first, second = InstanceId("chat"), InstanceId("chat", "r1")
    for number, instance in enumerate((first, second, InstanceId("chat-r1"))):
        files.write_pid(instance, number)
        files.log_path(instance).write_text(f"of {number}\n")
        files.write_handoff(PreparedEngine(instance.pool_id, "/e", replica_id=instance.replica_id), number, written_at_ms=0)
    assert names(files.root) == [
        "cache", "chat-r1.pid", "chat.pid", "chat@r1.pid", "engine-chat-r1.log", "engine-chat.log", "engine-chat@r1.log",
        "engines", "shims", "work",
    ]  # fmt: skip
    assert [files.pid_path(i).read_text() + files.tail_log(i)[0] for i in (first, second)] == ["0of 0", "1of 1"]
    assert files.log_mark(first).keys().isdisjoint(files.log_mark(second))
    assert files.launch_log(second, files.log_mark(first)).lines == ("of 1",)
    files.remove_pid(second)
    files.remove_handoff(second)
    assert files.pid_path(first).exists() and names(files.engines.path) == ["chat-r0.json", "chat-r1-r0.json", "engine.json"]
    files.write_pid(second, 1)
    (files.root / "engine-chat@r1.log.2").touch()
    files.forget_pool("chat")
    assert names(files.root) == ["cache", "chat-r1.pid", "engine-chat-r1.log", "engines", "shims", "work"]
    files.write_pid(second, 1)
    files.remove_stale()
    assert not files.pid_path(second).exists()


def test_damaged_records_are_passed_over(files: RuntimeFiles) -> None:
    files.prepare()
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"schema_version": 3, "identity": {}}'), ("d", "[" * 100_000)):
        (files.root / "shims" / f"{name}.json").write_text(text)
    assert files.records.all() == []


def test_what_is_printable_stays() -> None:
    assert printable("naïve – ü 日本\r") == "naïve – ü 日本"
