"""The facts of a machine, read from made-up roots and from this one."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.preflight import HostFacts
from pool_managerd.host import facts
from pool_managerd.host.facts import gather

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:23F0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1F90 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
"""
TCP6 = """\
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:1F91 00000000000000000000000000000000:0000 0A 0:0
 garbage
"""


def put(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with two GPUs behind NVSwitches."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-nvswitchctl", "tty"):
        put(tmp_path, f"dev/{name}")
    (tmp_path / "dev/shm").mkdir()
    put(tmp_path, "proc/net/tcp", TCP)
    put(tmp_path, "proc/net/tcp6", TCP6)
    put(tmp_path, "proc/1/comm", "systemd\n")
    put(tmp_path, "etc/cdi/nvidia.yaml")
    put(tmp_path, "etc/cdi/other.yaml")
    return tmp_path


def look(root: Path, **env: str) -> HostFacts:
    return gather(DeviceScan(), [], env=env, root=root)


def test_device_files_and_descriptions_are_found(root: Path) -> None:
    found = look(root)
    assert found.device_nodes == {"nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-nvswitchctl"}
    assert found.cdi_files == ("/etc/cdi/nvidia.yaml",)


def test_memory_is_in_bytes_and_ports_are_those_that_listen(root: Path) -> None:
    found = look(root)
    assert found.ports_taken == {9200, 8081}
    assert found.shm_total_bytes is not None
    assert found.shm_total_bytes > 0


def test_the_fabric_manager_is_known_by_its_process_and_unknown_inside_a_container(root: Path) -> None:
    assert look(root).fabric_manager is False
    put(root, ".dockerenv")
    assert look(root).fabric_manager is None
    put(root, "proc/77/comm", "nv-fabricmanage\n")
    assert look(root).fabric_manager is True
    (root / "dev/nvidia-nvswitchctl").unlink()
    assert look(root).fabric_manager is None


def test_tools_are_those_on_the_given_path(root: Path) -> None:
    for name, mode in (("nvcc", 0o755), ("git", 0o644)):
        put(root, f"bin/{name}")
        (root / f"bin/{name}").chmod(mode)
    assert look(root, PATH=str(root / "bin")).tools == {"nvcc": str(root / "bin/nvcc")}
    assert look(root).tools == {}
    assert look(root, PATH=str(root / "bin")).cuda_tool is not None


def test_a_root_with_nothing_in_it_has_no_facts_and_no_errors(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert not (found.device_nodes or found.ports_taken or found.cdi_files)
    assert found.shm_total_bytes is None


def test_a_directory_is_checked_by_the_nearest_one_that_exists(tmp_path: Path) -> None:
    put(tmp_path, "file")
    places = [("state", tmp_path / "a/b/c"), ("runtime", tmp_path / "file/x"), ("tmp", tmp_path)]
    made, blocked, there = gather(DeviceScan(), places, env={}).folders
    assert made.problem is None
    assert (made.free_bytes or 0) > 0
    assert blocked.problem == f"{tmp_path / 'file'} is no directory"
    assert (there.role, there.path, there.problem) == ("tmp", str(tmp_path), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_directory_that_is_not_ours_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(os, "access", lambda path, *_a, **_k: asked.append(path))
    (folder,) = gather(DeviceScan(), [("state", tmp_path / "new")], env={}).folders
    assert folder.problem == f"{tmp_path} is not writable for this user"
    assert asked == [tmp_path]


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """What a dead network disk waits for."""
    forever = threading.Event()
    yield forever
    forever.set()


def test_a_directory_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: threading.Event
) -> None:
    monkeypatch.setattr(facts, "FOLDER_TIMEOUT_S", 0.05)

    def hang(_path: Path) -> None:
        stuck.wait(30)
        raise OSError("stale file handle")

    monkeypatch.setattr(os, "statvfs", hang)
    began = time.monotonic()
    folder = facts._folder("state", tmp_path)
    assert time.monotonic() - began < 5
    assert folder.problem == "it did not answer within 0.05 s"


def test_this_machine_is_read_as_it_is(tmp_path: Path) -> None:
    scan = DeviceScan()
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        found = gather(scan, [("tmp", tmp_path)], env=os.environ)
        assert time.monotonic() - began < 2
        assert server.getsockname()[1] in found.ports_taken
    assert found.scan is scan
    assert found.as_root is (os.geteuid() == 0)
    assert found.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert all(Path(where).is_file() for where in found.tools.values())
