"""The programs to compare with, running the same engine program as often as we do."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.processes import running
from bench.result import NotInstalledError

Programs = Mapping[str, Sequence[str]]


@contextlib.contextmanager
def runit(directory: Path, programs: Programs) -> Iterator[subprocess.Popen[bytes]]:
    """runsvdir with one runsv per program, for the time of the block. Raises NotInstalledError."""
    runsvdir = _find("runsvdir", "runit")
    _find("runsv", "runit")
    services = directory / "services"
    for name, argv in programs.items():
        service = services / name
        service.mkdir(parents=True)
        script = service / "run"
        script.write_text(f"#!/bin/sh\nexec {' '.join(argv)} 2>&1\n")
        script.chmod(0o755)
    # SIGHUP: every runsv is told to stop its program and to go.
    with running([runsvdir, str(services)], directory / "runsvdir.log", stop=signal.SIGHUP) as child:
        yield child


@contextlib.contextmanager
def supervisord(directory: Path, programs: Programs) -> Iterator[subprocess.Popen[bytes]]:
    """supervisord as quick as it can be set: no start seconds, always restarted. Raises NotInstalledError."""
    program = _find("supervisord", "supervisord")
    directory.mkdir()
    lines = ["[supervisord]", "nodaemon=true", f"logfile={directory}/supervisord.log", f"pidfile={directory}/supervisord.pid"]
    lines += [f"childlogdir={directory}", "minfds=4096", ""]
    for name, argv in programs.items():
        lines += [f"[program:{name}]", f"command={' '.join(argv)}", "startsecs=0", "autorestart=true", ""]
    config = directory / "supervisord.conf"
    config.write_text("\n".join(lines))
    with running([program, "-n", "-c", str(config)], directory / "out.log", cwd=directory) as child:
        yield child


@contextlib.contextmanager
def bare_loop(directory: Path, programs: Programs) -> Iterator[subprocess.Popen[bytes]]:
    """A Python loop that does nothing but start again what ended: what the language costs."""
    directory.mkdir()
    file = directory / "programs.json"
    file.write_text(json.dumps([list(argv) for argv in programs.values()]))
    script = Path(__file__).with_name("bare_loop.py")
    with running([sys.executable, str(script), str(file)], directory / "out.log", cwd=directory) as child:
        yield child


SUPERVISORS = {"runit": runit, "supervisord": supervisord, "bare-python": bare_loop}


def _find(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise NotInstalledError(f"{package} is not installed")
    return found
