"""A program that is asked what it is runs as an engine would, and nothing of it stays."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pool_managerd.runtime import procfs
from tests.conftest import confined
from tests.runtime.support import alive, end

ENV = {"PATH": "/usr/bin:/bin"}


def run(script: str, timeout_s: float = 10.0, max_bytes: int = 65536) -> tuple[str, str]:
    answer = confined()(["/bin/sh", "-c", script], ENV, timeout_s, max_bytes)
    return answer.output.decode(), answer.problem


def test_what_it_prints_and_how_it_ended_is_told() -> None:
    assert run("echo out; echo err >&2") == ("out\nerr\n", "")
    assert run("exit 3") == ("", "exited with code 3")
    assert run("kill -ILL $$") == ("", "was ended by signal 4")
    assert confined()(["/no/such"], ENV, 1, 1).problem == "cannot be run: No such file or directory"


def test_it_is_ended_at_its_bounds() -> None:
    began = time.monotonic()
    assert run("sleep 60", timeout_s=0.2)[1] == "gave no answer within 0.2 s"
    output, problem = run("while :; do echo babble; done", max_bytes=1000)
    assert (len(output), problem) == (1000, "does not end")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("outcome", ["exit 0", "sleep 60", "kill -9 $$"])
def test_what_it_forked_is_gone_whatever_session_it_chose(outcome: str) -> None:
    fork = "setsid sh -c 'setsid sleep 60 >&- 2>&- & echo $!' & wait; " + outcome
    output, _ = run(fork, timeout_s=0.5)
    assert not alive(int(output))


def test_what_it_leaves_in_its_temporary_directory_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM does, which makes a cache there to print its help."""
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    output, problem = run('mkdir "$TMPDIR/cache" && touch "$TMPDIR/cache/x" && echo "$TMPDIR"; sleep 60', timeout_s=0.5)
    assert output.startswith(str(tmp_path)) and problem == "does not end"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", "/no/such")
    assert run("echo asked all the same")[0] == "asked all the same\n"


def test_it_has_no_privileges_no_secrets_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH_TOKEN", "hunter2")
    output, _ = run("cat /proc/self/status; env; id -u; ulimit -c")
    status = dict(line.split(":\t", 1) for line in output.splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert "hunter2" not in output
    uid, core = output.splitlines()[-2:]
    assert core == "0"
    if os.geteuid() == 0:
        assert 61184 <= int(uid) <= 65519


@pytest.mark.usefixtures("as_root")
def test_a_program_that_only_root_may_run_is_not_run(root: Path) -> None:
    program = root / "engine"
    program.write_text("#!/bin/sh\necho ran")
    program.chmod(0o700)
    answer = confined()([str(program)], ENV, 1, 100)
    assert (answer.output, answer.problem) == (b"", "cannot be run: Permission denied")


def test_it_works_with_more_files_open_than_select_knows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this machine lets nobody open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert run("echo hello") == ("hello\n", "")
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_ends_with_the_daemon_that_asked(root: Path) -> None:
    code = (
        "import sys; from tests.conftest import confined\n"
        "confined()(['/bin/sh', '-c', 'setsid sleep 60 >&- 2>&- & echo $! $TMPDIR > $0; wait', sys.argv[1]], {}, 60, 100)"
    )
    told = root / "told"
    told.touch()
    told.chmod(0o666)
    repository = Path(__file__).parents[2]
    daemon = subprocess.Popen([sys.executable, "-c", code, str(told)], cwd=repository, env={**os.environ, "PYTHONPATH": "src"})
    deadline = time.monotonic() + 15
    while not told.read_text().strip():
        assert time.monotonic() < deadline, "it was never run"
    pid, temporary = told.read_text().split()
    sleeper = int(pid)
    end(daemon.pid, signal.SIGKILL)
    daemon.wait()
    while alive(sleeper):
        assert time.monotonic() < deadline, f"{procfs.stat(sleeper)} outlived the daemon"
    while Path(temporary).exists():
        assert time.monotonic() < deadline, "its temporary directory outlived the daemon"
