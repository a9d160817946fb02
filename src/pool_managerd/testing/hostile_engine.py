"""An engine that serves well and tries every wall around it, to tell what it reached. Stdlib only.

Run it as ``python hostile_engine.py --port N [flags]``. ``GET /report`` tries all walls anew and answers with a JSON object:
the name of each wall, and whether it was passed. Nothing that it reaches is changed, but for files that it says it made.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_PTRACE_SEIZE, _PTRACE_DETACH = 0x4206, 17


def options() -> argparse.Namespace:
    """Whom and what to attack."""
    flags = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--daemon", type=int, default=0, metavar="PID")
    flags.add_argument("--other", type=int, default=0, metavar="PID", help="another pool's engine")
    flags.add_argument("--state", type=Path, default=Path("/nonexistent"))
    flags.add_argument("--runtime", type=Path, default=Path("/nonexistent"))
    flags.add_argument("--secret-file", type=Path, default=Path("/etc/shadow"))
    flags.add_argument("--keep-grandchild", action="store_true", help="one that leaves session and parent and has no environment")
    known, _ = flags.parse_known_args()
    return known


def walls(given: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is tried, by name; an attempt that raises was held."""
    run, shim = given.runtime, os.getppid()
    against = {"daemon": given.daemon, "shim": shim, "other": given.other}
    tries: dict[str, Callable[[], object]] = {
        "read_state": (given.state / "state.db").read_bytes,
        "write_state": lambda: _make(given.state / "planted"),
        "read_records": lambda: list((run / "shims").iterdir()),
        "write_records": lambda: _make(run / "shims/planted.json"),
        "write_handoff": lambda: _make(run / "engines/.planted"),
        "write_log": lambda: (run / "engine-hostile.log").open("ab").close(),
        "move_directories": lambda: (run / "shims").rename(run / "moved").rename(run / "shims"),
        "read_others_files": lambda: list((run / "work/other").iterdir()),
        "read_secret_file": given.secret_file.read_bytes,
        "become_root": lambda: os.setresuid(0, 0, 0),
        "raise_limits": _raise_limits,
    }
    for name, pid in against.items():
        tries[f"{name}_environment"] = lambda pid=pid: Path(f"/proc/{pid}/environ").read_bytes()  # type: ignore[misc]
        tries[f"{name}_memory"] = lambda pid=pid: _read_memory(pid)  # type: ignore[misc]
        tries[f"{name}_trace"] = lambda pid=pid: _trace(pid)  # type: ignore[misc]
        tries[f"{name}_signal"] = lambda pid=pid: os.kill(pid, 0)  # type: ignore[misc]
    return tries


def _make(path: Path) -> None:
    path.touch()
    path.unlink()


def _read_memory(pid: int) -> bytes:
    mapped = next(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if " r" in line)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(int(mapped.partition("-")[0], 16))
        return memory.read(16)


def _trace(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(_PTRACE_SEIZE, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    libc.ptrace(_PTRACE_DETACH, pid, None, None)


def _raise_limits() -> None:
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return


def _passed(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Exception:  # noqa: BLE001 - whatever stopped it, it was stopped
        return False
    return True


def keep_grandchild() -> int:
    """A process that nothing of its environment, session, group or parent ties to this one; its pid."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        child = os.fork()
        if child == 0:
            os.close(writing)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.execve("/bin/sleep", ["kworker", "600"], {})  # noqa: S606
        os.write(writing, str(child).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    return int(os.read(reading, 32))


def main() -> None:
    given = options()
    kept = keep_grandchild() if given.keep_grandchild else 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/report":
                answer = {name: _passed(attempt) for name, attempt in walls(given).items()}
                body = json.dumps({"walls": answer, "grandchild": kept}).encode()
            else:
                body = b'{"status": "ok"}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing: the log is not what this is about."""

    ThreadingHTTPServer(("127.0.0.1", given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
