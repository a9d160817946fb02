"""The process that talks to the GPU driver, so that nobody else has to: it may hang, crash or be killed.

Run as ``python -I nvml_worker.py PARENT_PID KMSG [NUMBER]``; NUMBER is the last record of the log KMSG that was read before.
A line ``{"id": 1}`` asks for a scan and is answered with ``{"id": 1, "ok": true, "scan": {...}}`` or ``{"id": 1, "ok": false,
"nvml": 18, ...}``; ``{"incident": {...}}`` lines come on their own. ``log`` in any of them is the last record that was read.
It ends when its input ends or its parent does. Standard library and pynvml only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_DOUBLE_BIT_ECC, _CRITICAL_XID = 2, 8
_NOT_SUPPORTED, _TIMEOUT = 3, 10
_EVENT_WAIT_MS = 1000
_AFTER_ERROR_S = 5.0
_BURST, _PER_SECOND, _MAX_KINDS = 10.0, 1.0, 256
_DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


def _make_package_importable() -> None:
    """Let ``pool_managerd.host`` be imported without running the packages' ``__init__``, which load a lot."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - before anything is imported
    for name, path in (("pool_managerd", os.path.dirname(here)), ("pool_managerd.host", here)):  # noqa: PTH120
        package: Any = type(sys)(name)
        package.__path__ = [path]
        sys.modules[name] = package


class Output:
    """Lines to the daemon, from any thread. Incidents are limited: a program can cause thousands of them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._tokens: dict[tuple[Any, Any], tuple[float, float]] = {}
        self._dropped = 0
        self._notes: list[str] = []
        self.log: int | None = None

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]

    def incident(self, incident: dict[str, Any], log: int | None = None) -> None:
        """Limited for each kind on each GPU apart: a storm of one program's errors must not hide the death of a GPU."""
        now, kind = time.monotonic(), (incident.get("uuid") or incident.get("pci_bus_id"), incident.get("xid"))
        with self._lock:
            tokens, at = self._tokens.pop(kind, (_BURST, now))
            tokens = min(_BURST, tokens + (now - at) * _PER_SECOND)
            self._tokens[kind] = (tokens - 1 if tokens >= 1 else tokens), now
            if len(self._tokens) > _MAX_KINDS:
                del self._tokens[next(iter(self._tokens))]
            if tokens < 1:
                self._dropped += 1
                return
        self.send({"incident": incident, "log": log})

    def note(self, text: str) -> None:
        """Something to be said once, with the next scan."""
        with self._lock:
            self._notes.append(text)

    def take_notes(self) -> list[str]:
        with self._lock:
            notes, self._notes = self._notes, []
            if self._dropped:
                notes.append(f"{self._dropped} GPU incidents came too fast and were left out")
            self._dropped = 0
            return notes


class EventWatch:
    """Xid and ECC events through NVML. GPUs are registered by the scan; a thread waits."""

    def __init__(self, nvml: Any, output: Output) -> None:
        self._nvml, self._output = nvml, output
        self._set: Any = None
        self._named: dict[int, tuple[str, str]] = {}
        self._silent: set[str] = set()

    def register(self, handle: Any, uuid: str, pci: str) -> None:
        """Called at every scan: what failed is tried again. A GPU that cannot tell of events is left to the kernel log."""
        key = ctypes.cast(handle, ctypes.c_void_p).value or 0
        if self._named.get(key) == (uuid, pci):
            return
        self._named[key] = (uuid, pci)  # before it can tell of anything
        try:
            if self._set is None:
                self._set = self._nvml.nvmlEventSetCreate()
                threading.Thread(target=self._wait, daemon=True).start()
            self._subscribe(handle)
        except self._nvml.NVMLError as error:
            del self._named[key]
            if uuid not in self._silent:
                self._output.note(f"the driver tells of no events of GPU {uuid}: {error}")
            self._silent.add(uuid)

    def _subscribe(self, handle: Any) -> None:
        """The driver refuses all kinds when a GPU lacks one: those without ECC memory tell of Xids all the same."""
        try:
            self._nvml.nvmlDeviceRegisterEvents(handle, _DOUBLE_BIT_ECC | _CRITICAL_XID, self._set)
        except self._nvml.NVMLError as error:
            if error.value != _NOT_SUPPORTED:
                raise
            self._nvml.nvmlDeviceRegisterEvents(handle, _CRITICAL_XID, self._set)

    def _wait(self) -> None:
        while True:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._set, _EVENT_WAIT_MS)
            except self._nvml.NVMLError as error:
                if error.value != _TIMEOUT:
                    time.sleep(_AFTER_ERROR_S)  # a lost GPU answers at once, again and again
                continue
            uuid, pci = self._named.get(ctypes.cast(event.device, ctypes.c_void_p).value or 0, (None, None))
            found: dict[str, Any] = {"source": "nvml", "uuid": uuid, "pci_bus_id": pci, "xid": None}
            if event.eventType & _CRITICAL_XID:
                self._output.incident({**found, "xid": event.eventData})
            elif event.eventType & _DOUBLE_BIT_ECC:
                self._output.incident({**found, "text": "an uncorrectable memory error (double bit) was counted"})


class Worker:
    """NVML is loaded at the first scan, and again until that succeeds."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._reader: Any = None

    def answer(self) -> dict[str, Any]:
        try:
            import pynvml  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            return {"ok": False, "nvml": None, "text": f"the Python package nvidia-ml-py is not installed: {error}"}
        try:
            if self._reader is None:
                self._open(pynvml)
            scan = self._reader.scan()
        except pynvml.NVMLError as error:
            at_init = self._reader is None
            driver = any(os.path.exists(path) for path in _DRIVER_FILES)  # noqa: PTH110
            return {"ok": False, "nvml": error.value, "text": str(error), "at_init": at_init, "driver_files": driver}
        except Exception as error:  # noqa: BLE001 - the boundary: what the binding or a library does not foresee is one line
            return {"ok": False, "nvml": None, "text": f"{type(error).__name__}: {error}", "unforeseen": True}
        if scan is None:
            return {"ok": False, "changing": True}
        return {"ok": True, "scan": scan, "notes": self._output.take_notes()}

    def _open(self, nvml: Any) -> None:
        from pool_managerd.host.nvml_reading import NvmlReader

        nvml.nvmlInit()
        self._reader = NvmlReader(nvml, EventWatch(nvml, self._output).register)
        gc.collect()
        gc.freeze()


def watch_kernel_log(path: str, after: int | None, output: Output) -> None:
    """Pass on what comes after record ``after``, and how far it was read."""
    from pool_managerd.host.kernel_log import follow, xid_of

    try:
        for number, line in follow(Path(path), after):
            incident = xid_of(line)
            if incident is not None:
                output.incident(incident, number)
            elif not line:
                output.send({"log": number})  # at once: the driver may hang before anything else can be said
            output.log = number  # only now: the next worker begins behind it
    except OSError as error:
        output.note(f"GPU errors in the kernel's log are not seen: cannot read {path}: {error.strerror}")


def _read_requests(requests: queue.SimpleQueue[bytes]) -> None:
    """In a thread of its own: the end of the daemon is noticed although the driver hangs."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _private_output() -> int:
    """Standard output for our lines alone: what a library prints goes to standard error."""
    fd = os.dup(1)
    os.dup2(2, 1)
    return fd


def main() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NAME, b"pm-nvml")
    if os.getppid() != int(sys.argv[1]):  # it ended before we asked to be told
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's to answer
    _make_package_importable()
    output = Output(_private_output())
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(256 * 1024)
    after = int(sys.argv[3]) if len(sys.argv) > 3 else None
    threading.Thread(target=watch_kernel_log, args=(sys.argv[2], after, output), daemon=True).start()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    worker = Worker(output)
    while True:
        request = json.loads(requests.get())
        output.send({"id": request["id"], **worker.answer(), "log": output.log})


if __name__ == "__main__":
    main()
