"""What an engine reaches that tries every wall, beside what its pool's ``isolation`` claims."""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.runtime import procfs
from pool_managerd.testing import hostile_engine
from tests.conftest import free_port, wait_until
from tests.system.daemons import Daemon
from tests.system.nodes import alive
from tests.system.test_daemon_refusals import AS_NOBODY, Make, make

__all__ = ["make"]

# These hold between processes of one user, too: the daemon and its shims cannot be looked into, and nobody becomes root.
HOLD_WITHOUT_ISOLATION = {
    *(f"{who}_{what}" for who in ("daemon", "shim") for what in ("environment", "memory", "trace")),
    "read_secret_file", "become_root", "raise_limits",
}  # fmt: skip


def report(daemon: Daemon, tmp: Path) -> tuple[dict[str, bool], dict[str, Any], int]:
    """What was passed, the pool's status, and the grandchild that was to stay."""
    assert daemon.process is not None
    secret = tmp / "secret"
    secret.write_text("root's alone")
    secret.chmod(0o600)
    other = daemon.preload("other", env={"HF_TOKEN": "CANARY"})["pid"]
    port = free_port()
    flags = ["--port", port, "--daemon", daemon.process.pid, "--other", other, "--state", daemon.state, "--runtime", daemon.run,
             "--secret-file", secret, "--keep-grandchild"]  # fmt: skip
    script = ["-I", hostile_engine.__file__, *map(str, flags)]
    code, answer = daemon.post("/v1/pools/hostile/preload", {"binary_path": sys.executable, "flags": script, "port": port})
    assert code == 200, answer
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/report", timeout=30) as told:
        found = json.loads(told.read())
    return found["walls"], daemon.status("hostile"), found["grandchild"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives engines users of their own")
def test_an_engine_with_a_user_of_its_own_passes_no_wall(make: Make, open_dir: Path) -> None:
    daemon = make().start()
    passed, status, grandchild = report(daemon, open_dir)
    (uid,) = procfs.uids(status["pid"])
    assert status["isolation"] == f"user:{uid},no_new_privs,no_caps"
    assert [wall for wall, through in passed.items() if through] == []
    assert alive(grandchild)
    assert daemon.post("/v1/pools/hostile/stop?wait=true")[0] == 200
    assert not alive(grandchild)
    assert daemon.delete("/v1/pools/hostile")[0] == 200
    assert not [path for path in daemon.run.rglob("*hostile*") if not path.name.endswith(".removed")]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becoming another user needs root and setpriv")
def test_an_engine_that_shares_the_daemons_user_is_called_not_isolated_and_some_walls_hold(make: Make, open_dir: Path) -> None:
    daemon = make()
    os.chown(daemon.folder, 65534, 65534)
    daemon.start(wrap=AS_NOBODY)
    passed, status, grandchild = report(daemon, open_dir)
    assert status["isolation"] == "none"
    assert [wall for wall in sorted(HOLD_WITHOUT_ISOLATION) if passed[wall]] == []
    assert all(passed[wall] for wall in ("other_environment", "daemon_signal", "write_records", "write_state"))
    assert daemon.process is not None
    record = next((daemon.run / "shims").glob("hostile-*.json"))
    wait_until(lambda: f"[{grandchild}," in record.read_text(), "the shim to write it down")
    daemon.process.kill()
    daemon.process.wait()
    os.kill(parent(status["pid"]), 9)
    assert alive(grandchild)
    daemon.start(wrap=AS_NOBODY)
    wait_until(lambda: not alive(grandchild), "the next daemon to end the grandchild")


def parent(pid: int) -> int:
    found = procfs.stat(pid)
    assert found is not None
    return found.parent_pid
