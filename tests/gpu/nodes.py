"""A real daemon on simulated GPUs, and the pools that these tests run on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import FAKE_ENGINE, REPOSITORY
from tests.host.simulated import NONE, gpu_uuid, topology
from tests.system.daemons import Daemon
from tests.system.nodes import alive

Json = dict[str, Any]
GIB = 1 << 30
OTHERS_PID = 4_000_000
"""A pid that no process has: what a topology calls somebody else's."""

_NAMES = ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3060")
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def cards(*gib: int, order: tuple[int, ...] = ()) -> str:
    """GPUs of these sizes. ``order`` says which card is listed at which index; each keeps its UUID and its slot."""
    listed = order or tuple(range(len(gib)))
    return NONE + "".join(
        f'gpu {index} uuid={gpu_uuid(card)} name="{_NAMES[card % 2]}" pci=0000:{card + 1:02x}:00.0 cc=8.6'
        f" vram={gib[card]}GiB reserved=400MiB\n"
        for index, card in enumerate(listed)
    )


class GpuNode(Daemon):
    """One folder, its topology file, and the daemons that run on both, one after the other.

    ``library`` is the folder of the simulated driver: it is built once for all. ``lines`` stay in every topology.
    ``kmsg``: a FIFO plays the kernel's log.
    """

    def __init__(
        self,
        folder: Path,
        library: Path,
        text: str,
        *lines: str,
        pools: list[Json],
        gpu: Json | None = None,
        kmsg: bool = False,
        more: str = "",
    ) -> None:
        folder.mkdir()
        state = folder / "state"
        state.mkdir(mode=0o700)
        shutil.copytree(library, state / library.name)
        self.always = lines
        self.gpus = topology(folder / "gpus", text, *lines)
        self.kernel_log = folder / "gpus.kmsg"
        if kmsg:
            os.mkfifo(self.kernel_log)
        section = {"simulate": str(self.gpus), "rescan_interval_ms": 1000, "vram_wait_ms": 1500, **(gpu or {})}
        super().__init__(folder, f"gpu: {json.dumps(section)}\npools: {json.dumps(pools)}\n{more}")

    def start(self, **how: Any) -> GpuNode:
        """As for any daemon."""
        super().start(**how)
        return self

    def become(self, text: str, *lines: str) -> None:
        """Other hardware from now on, or the same in another state."""
        topology(self.gpus, text, *lines, *self.always)

    # --- what it says ---

    def devices(self) -> Json:
        code, found = self.get("/v1/devices")
        assert code == 200, found
        return dict(found)

    def device(self, name: str = "0") -> Json:
        """The row of a device, by its label, once there is one."""
        found: list[Json] = []

        def listed() -> list[Json]:
            found[:] = [dict(row) for row in self.devices()["devices"] if row["device"] == name]
            return found

        until(listed, f"device {name} to be listed", 30)
        return found[0]

    def until_device(self, condition: Callable[[Json], bool], what: str, name: str = "0", timeout_s: float = 30) -> None:
        until(lambda: condition(self.device(name)), what, timeout_s)

    def until_ready(self, *pools: str, timeout_s: float = 30) -> None:
        def missing() -> list[Json]:
            return [status for status in map(self.status, pools) if not status["ready"]]

        until(lambda: not missing(), f"{' and '.join(pools)} to be ready", timeout_s, missing)

    def until_refused(self, pool: str, *words: str) -> str:
        """Its last error, once that has all these words."""
        until(
            lambda: all(word in str(self.status(pool)["last_error"]) for word in words), f"{pool} to be refused with {words}", 30,
            lambda: self.status(pool),
        )  # fmt: skip
        status = self.status(pool)
        assert not status["live"], status
        return str(status["last_error"])

    def metric(self, name: str, **labels: str) -> float | None:
        """The one sample of ``name`` that has these labels; None when there is none."""
        text = self.get("/metrics")[1]
        found = [m for line in text.splitlines() if (m := _SAMPLE.match(line)) and m[1] == name]
        values = [float(m[3]) for m in found if labels.items() <= dict(_LABEL.findall(m[2] or "")).items()]
        assert len(values) < 2, f"{len(values)} samples of {name} with {labels}"
        return values[0] if values else None

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The CLI, asking this daemon."""
        return run_cli(*words, "--url", f"http://127.0.0.1:{self.port}", folder=self.folder)

    # --- its processes ---

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def environment(self, pool: str) -> dict[str, str]:
        """Of the engine process, as the kernel has it."""
        raw = Path(f"/proc/{self.status(pool)['pid']}/environ").read_bytes()
        return dict(part.decode().split("=", 1) for part in raw.split(b"\0") if b"=" in part)

    def workers(self) -> list[int]:
        """Processes of this daemon that talk to the driver: children by the name they gave themselves."""
        return [pid for pid in children(self.pid) if _comm(pid) == "pm-nvml"]


def run_cli(*words: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """``pool-managerd WORDS`` in ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "pool_managerd.cli", *words], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=30, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), **env},
    )  # fmt: skip


def scripted(folder: Path, *flags: str, name: str = "llama-server") -> Path:
    """The scripted engine as a binary that a pool can be configured with."""
    path = folder / name
    path.write_text(
        f'#!/bin/sh\ncase "$1" in --help|--version) exit 1;; esac\n'
        f'exec "{sys.executable}" -I "{FAKE_ENGINE}" "$@" {" ".join(flags)}\n'
    )
    path.chmod(0o755)
    return path


def pool(pool_id: str, model: Path, binary: Path | None, **keys: Any) -> Json:
    """A pool's configuration; ``gib`` is the memory it asks for. Without a ``binary`` the packaged engine runs it."""
    gib = keys.pop("gib", None)
    if gib is not None:
        keys["vram_bytes"] = int(gib * GIB)
    how = {"mode": "package"} if binary is None else {"mode": "binary", "binary": {"path": str(binary)}}
    found = {"id": pool_id, "engine": "llamacpp", "model": f"file:{model}", "ctx": 256, **keys}
    return {**found, "provisioning": {**how, "flags": ["--threads", "1"], **found.pop("provisioning", {})}}


def children(pid: int) -> list[int]:
    """Living children of a process, whichever of its threads made them."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            continue
    return [child for child in found if alive(child)]


def until(condition: Callable[[], Any], what: str, timeout_s: float = 30, now: Callable[[], object] | None = None) -> None:
    """Return once ``condition`` holds; at the deadline fail with ``what``, and with what is ``now`` instead."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain for {what}" + (f": {now()}" if now else "")
        time.sleep(0.03)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
