"""What this machine is, read from files and limits: no program is run, no privilege is needed, nothing waits for long."""

from __future__ import annotations

import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.preflight.facts import CUDA_TOOLS, Folder, HostFacts
from pool_managerd.core.preflight.gpus import SWITCHES
from pool_managerd.core.preflight.tools import ALL_TOOLS
from pool_managerd.host.processes import text_of

FOLDER_TIMEOUT_S = 2.0
_LOCAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/cuda/bin"
"""Where tools are looked for when a directory on PATH does not answer."""
_MAX_TABLE_BYTES = 4 << 20
_MAX_PROCESSES = 65_536
_FABRIC_MANAGER = "nv-fabricmanage"  # as long as the kernel keeps a name
_LISTENING = "0A"
_T = TypeVar("_T")


def gather(scan: DeviceScan, folders: Iterable[tuple[str, Path]], *, env: Mapping[str, str], root: Path = Path("/")) -> HostFacts:
    """What this machine has now, RAM left out (host/memory.py). ``folders`` are pairs of role and path.

    ``root`` is where /dev, /proc and /etc are found. Blocking, but bounded: a directory on a dead network disk is
    given up after ``FOLDER_TIMEOUT_S``.
    """
    nodes = frozenset(name for name in _names(root / "dev") if name.startswith("nvidia") or name == "dxg")
    shm = _statvfs(root / "dev/shm")
    return HostFacts(
        tools=_tools_in_time(env), scan=scan,
        device_nodes=nodes,
        fabric_manager=_fabric_manager(root) if SWITCHES in nodes else None,
        cdi_files=tuple(_cdi_files(root)),
        memlock_bytes=_limit(resource.RLIMIT_MEMLOCK), open_files=_limit(resource.RLIMIT_NOFILE),
        shm_total_bytes=shm and shm[0],
        folders=tuple(_folder(role, path) for role, path in folders),
        ports_taken=frozenset(listening_ports(root / "proc")),
        as_root=os.geteuid() == 0,
    )  # fmt: skip


def listening_ports(proc: Path) -> Iterator[int]:
    """TCP ports that something listens on, on any address of this network namespace."""
    for table in ("net/tcp", "net/tcp6"):
        for line in text_of(proc / table, _MAX_TABLE_BYTES).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == _LISTENING:
                yield int(fields[1].rpartition(":")[2], 16)


def _tools_in_time(env: Mapping[str, str]) -> dict[str, str]:
    found = _within(lambda: _tools(env), None)
    return _tools({"PATH": _LOCAL_PATH}) if found is None else found


def _tools(env: Mapping[str, str]) -> dict[str, str]:
    path = env.get("PATH", "")
    found = ((tool, shutil.which(tool, path=path)) for tool in dict.fromkeys((*CUDA_TOOLS, *ALL_TOOLS)))
    return {tool: where for tool, where in found if where is not None}


def _fabric_manager(root: Path) -> bool | None:
    """Whether its process is here; None where it may be outside of this container."""
    pids = [name for name in _names(root / "proc") if name.isdigit()][:_MAX_PROCESSES]
    if any(text_of(root / "proc" / pid / "comm") == _FABRIC_MANAGER for pid in pids):
        return True
    inside = any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv", "var/run/secrets/kubernetes.io"))
    return None if inside or not pids else False


def _cdi_files(root: Path) -> Iterator[str]:
    for folder in ("etc/cdi", "var/run/cdi"):
        names = sorted(_names(root / folder))
        yield from (f"/{folder}/{name}" for name in names if "nvidia" in name and name.endswith((".yaml", ".json")))


def _names(folder: Path) -> list[str]:
    """What is in a directory; nothing for one that cannot be read."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _folder(role: str, path: Path) -> Folder:
    gone = Folder(role, str(path), problem=f"it did not answer within {FOLDER_TIMEOUT_S:g} s")
    return _within(lambda: _look_at(role, path), gone)


def _look_at(role: str, path: Path) -> Folder:
    """The directory, or the nearest one above it that exists, where it would be made."""
    here = path.absolute()
    while not here.exists() and here != here.parent:
        here = here.parent
    if not here.is_dir():
        return Folder(role, str(path), problem=f"{here} is no directory")
    if not os.access(here, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return Folder(role, str(path), problem=f"{here} is not writable for this user")
    size = _statvfs(here)
    return Folder(role, str(path), free_bytes=size and size[1])


def _statvfs(path: Path) -> tuple[int, int] | None:
    """Total and free bytes, as an unprivileged user may use them."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _within(call: Callable[[], _T], otherwise: _T) -> _T:
    """What ``call`` gives within the time, else ``otherwise``: a stuck one is left behind in its thread."""
    answers: list[_T] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True, name="preflight")
    thread.start()
    thread.join(FOLDER_TIMEOUT_S)
    return answers[0] if answers else otherwise
