from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.handoff import Handoff
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.handoff import HandoffWatcher, parse_handoff
from tests.runtime.support import eventually


class Watched:
    """A watcher with a record of what it told."""

    def __init__(self, root: Path) -> None:
        self.files = RuntimeFiles(root)
        self.handoffs: list[Handoff] = []
        self.errors: list[tuple[str, str]] = []
        self.durations: list[float] = []
        self.watcher = HandoffWatcher(self.files, self._take, lambda *error: self.errors.append(error))

    def _take(self, handoff: Handoff, duration_ms: float) -> None:
        self.handoffs.append(handoff)
        self.durations.append(duration_ms)

    def drop(self, name: str, content: Any) -> Path:
        path = self.files.root / "engines" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "run")


NO_ENGINES = (
    "169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "[::ffff:169.254.169.254]",
    "[fe80::1%25eth0]", "[fd00:ec2::254]", "0.0.0.0", "0", "[::]", "224.0.0.1",
)  # fmt: skip
MINIMAL = {"pool_id": "ext", "url": "http://127.0.0.1:8000"}


def test_a_dropped_file_is_told_once_with_its_facts(watched: Watched) -> None:
    path = watched.drop(
        "x.json",
        {
            **MINIMAL,
            "replica_id": "r1",
            "engine": "vllm",
            "engine_version": "0.9",
            "device_mask": "0,1",
            "slots_total": 8,
            "slots_free": 7,
            "model": {"path": "/m"},
            "pid": 12,
            "anything": [1],
        },
    )
    watched.watcher.poll_once()
    watched.watcher.poll_once()
    expected = Handoff("ext", "r1", "http://127.0.0.1:8000", "vllm", "0.9", "0,1", 8, 7, "/m", 12, str(path))
    assert watched.handoffs == [expected]
    assert watched.durations[0] >= 0
    assert watched.errors == []


def test_the_synonyms_are_understood(watched: Watched) -> None:
    watched.drop("x.json", {"pool_id": "ext", "endpoint": "http://[::1]:80/", "gpu_device": 0, "slots": 2, "ready": True})
    watched.watcher.poll_once()
    (handoff,) = watched.handoffs
    assert (handoff.url, handoff.device_mask, handoff.slots_total, handoff.slots_free) == ("http://[::1]:80", "0", 2, None)
    assert (handoff.replica_id, handoff.engine, handoff.engine_version) == ("r0", "llamacpp", None)


def test_a_changed_file_is_told_again(watched: Watched) -> None:
    watched.drop("x.json", MINIMAL)
    watched.watcher.poll_once()
    watched.drop("x.json", {**MINIMAL, "slots": 3})
    watched.watcher.poll_once()
    assert [handoff.slots_total for handoff in watched.handoffs] == [None, 3]


def test_a_file_that_went_and_came_back_is_told_again(watched: Watched) -> None:
    watched.drop("x.json", MINIMAL)
    watched.watcher.poll_once()
    watched.drop("x.json", MINIMAL).unlink()
    watched.watcher.poll_once()
    watched.drop("x.json", MINIMAL)
    watched.watcher.poll_once()
    assert len(watched.handoffs) == 2


def test_files_of_our_own_and_other_kinds_are_passed_over(watched: Watched) -> None:
    watched.files.write_handoff(PreparedEngine("mine", "/bin/engine", port=1), 5, written_at_ms=0)
    watched.drop("engine.json", MINIMAL)
    watched.drop("llamacpp.json", {"model": {"id": "m"}, "path": "/m"})
    watched.drop("notes.txt", "not a handoff")
    watched.drop(".hidden.json", MINIMAL)
    watched.watcher.poll_once()
    assert watched.handoffs == []
    assert watched.errors == []


def test_a_file_under_our_name_that_we_did_not_write_counts(watched: Watched) -> None:
    watched.drop("ext-r0.json", MINIMAL)
    watched.watcher.poll_once()
    assert len(watched.handoffs) == 1


def test_a_malformed_file_is_reported_once_and_tried_again_when_it_changes(watched: Watched) -> None:
    path = watched.drop("x.json", "{")
    watched.watcher.poll_once()
    watched.watcher.poll_once()
    assert [error[0] for error in watched.errors] == [str(path)]
    assert "cannot use the handoff file" in watched.errors[0][1]
    watched.drop("x.json", MINIMAL)
    watched.watcher.poll_once()
    assert len(watched.handoffs) == 1


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "[" * 30_000,
        '{"pool_id": "ext", "url": "http://h:1", "x": "' + "x" * 70_000 + '"}',
        {**MINIMAL, "pool_id": "../x"},
        {**MINIMAL, "replica_id": "a/b"},
        {**MINIMAL, "url": "file:///etc/passwd"},
        {**MINIMAL, "url": "http://127.0.0.1"},
        {**MINIMAL, "url": "http://127.0.0.1:99999"},
        {**MINIMAL, "url": "http://u:p@127.0.0.1:80"},
        {**MINIMAL, "url": "http://127.0.0.1:80/path"},
        {**MINIMAL, "url": "http://127.0.0.1:80?x"},
        {**MINIMAL, "url": "http://127.0.0.1:80\n"},
        *({**MINIMAL, "url": f"http://{host}:80"} for host in NO_ENGINES),
        {**MINIMAL, "url": 5},
        {**MINIMAL, "slots": -1},
        {**MINIMAL, "slots": True},
        {**MINIMAL, "slots": 10**30},
        {**MINIMAL, "pid": "7"},
        {**MINIMAL, "engine": "a\x1bb"},
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_registered(watched: Watched, content: Any) -> None:
    watched.drop("x.json", content)
    watched.watcher.poll_once()
    assert watched.handoffs == []
    assert len(watched.errors) == 1


def test_links_fifos_and_directories_are_not_read(watched: Watched, tmp_path: Path) -> None:
    target = tmp_path / "target.json"
    target.write_text(json.dumps(MINIMAL))
    folder = watched.drop("x.txt", "").parent
    (folder / "link.json").symlink_to(target)
    (folder / "dir.json").mkdir()
    os.mkfifo(folder / "fifo.json")
    watched.watcher.poll_once()
    assert watched.handoffs == []
    assert len(watched.errors) == 3


def test_a_folder_that_cannot_be_used_is_said_once(watched: Watched) -> None:
    watched.files.root.mkdir()
    (watched.files.root / "engines").write_text("a file")
    watched.watcher.poll_once()
    watched.watcher.poll_once()
    assert len(watched.errors) == 1


async def test_it_watches_until_it_is_cancelled(watched: Watched) -> None:
    task = asyncio.create_task(watched.watcher.run())
    watched.drop("x.json", MINIMAL)
    await eventually(lambda: watched.handoffs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_object_without_pool_or_url_is_another_kind_of_file() -> None:
    assert parse_handoff({"pool_id": "p"}, "x") is None
    assert parse_handoff({"url": "http://h:1"}, "x") is None
