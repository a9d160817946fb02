"""A configuration file applied to a real daemon with real engines: one edit touches one pool, and whatever fails is told."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.system.daemons import Daemon

RULES = "reload: {bake_ms: 200}\n"
SECRET = "s3cr3t-of-the-pool"


def pools(model: Path, **ctx: int) -> str:
    """A line per pool; ``ctx`` by its id."""
    env = f'{{MY_TOKEN: "{SECRET}"}}'
    lines = [
        f'  - {{id: {pool_id}, engine: llamacpp, model: "file:{model}", ctx: {size}, slots: 1, '
        f'provisioning: {{flags: ["--threads", "1"], env: {env}}}}}\n'
        for pool_id, size in ctx.items()
    ]
    return "pools:\n" + "".join(lines)


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    made = Daemon(open_dir / "d", RULES)
    yield made
    made.end()


def write(daemon: Daemon, text: str) -> None:
    """What the file says of pools from now on; the rest of it stays."""
    head = daemon.config.read_text().partition("pools:")[0]
    daemon.config.write_text(head + text)


def all_ready(daemon: Daemon, *ids: str) -> dict[str, int]:
    """Their pids, once they are."""
    for pool_id in ids:
        daemon.until(lambda status: bool(status["ready"]), f"pool {pool_id} to be ready", pool_id, 60)
    return {pool_id: daemon.status(pool_id)["pid"] for pool_id in ids}


def size(daemon: Daemon, pool_id: str) -> str:
    """The context that its engine really has, by its own command line."""
    argv = Path(f"/proc/{daemon.status(pool_id)['pid']}/cmdline").read_bytes().split(b"\0")
    return argv[argv.index(b"--ctx-size") + 1].decode()


def command(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pool_managerd.cli", *words, "--url", f"http://127.0.0.1:{daemon.port}"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False, stdin=subprocess.DEVNULL)


def hang_up(daemon: Daemon) -> dict[str, Any]:
    assert daemon.process is not None
    before = len(daemon.lines("config_reread"))
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(daemon.lines("config_reread")) > before, "the file to be read again", 10)
    return daemon.lines("config_reread")[-1]


def test_one_edit_reloads_one_pool_and_an_earlier_configuration_comes_back(daemon: Daemon, smol_model: Path) -> None:
    write(daemon, pools(smol_model, a=512, b=512, c=512))
    daemon.start()
    before = all_ready(daemon, "a", "b", "c")
    assert command(daemon, "apply", "--dry-run").returncode == 0, "nothing would change"
    write(daemon, "# an edit\n" + pools(smol_model, c=512, a=512, b=1024))
    plan = command(daemon, "apply", "--dry-run")
    assert plan.returncode == 2 and "ctx: 512 -> 1024" in plan.stdout and "1 pool to change, 2 untouched" in plan.stdout, (
        plan.stderr
    )
    assert all_ready(daemon, "a", "b", "c") == before
    asked = command(daemon, "apply")
    assert asked.returncode == 2 and "no terminal" in asked.stderr and all_ready(daemon, "b")["b"] == before["b"]
    done = command(daemon, "apply", "--yes")
    assert done.returncode == 0 and "b  reload succeeded" in done.stdout, done.stderr
    after = all_ready(daemon, "a", "b", "c")
    assert {k: after[k] for k in "ac"} == {k: before[k] for k in "ac"} and after["b"] != before["b"]
    assert (size(daemon, "b"), size(daemon, "a")) == ("1024", "512")

    write(daemon, pools(smol_model, a=-1, b=1024, c=512))
    wrong = command(daemon, "apply", "--yes")
    assert wrong.returncode == 4 and "ctx" in wrong.stderr and hang_up(daemon)["outcome"] == "error"
    assert all_ready(daemon, "a", "b", "c") == after, "a file that cannot be used changes nothing"

    write(daemon, pools(smol_model, a=512, b=1024, c=256))
    assert hang_up(daemon)["outcome"] == "success"
    wait_until(lambda: len(daemon.lines("apply_finished")) == 2, "the apply to end", 60)
    third = all_ready(daemon, "a", "b", "c")
    assert {k: third[k] for k in "ab"} == {k: after[k] for k in "ab"} and size(daemon, "c") == "256"

    rows = json.loads(command(daemon, "config", "history", "-o", "json").stdout)
    assert [(row["number"], row["origin"]) for row in rows] == [(1, "start"), (2, "apply"), (3, "sighup")]
    back = command(daemon, "config", "rollback", "1", "--yes")
    assert back.returncode == 0, back.stderr
    assert (size(daemon, "a"), size(daemon, "b"), size(daemon, "c")) == ("512", "512", "512")
    assert all_ready(daemon, "a")["a"] == before["a"] and daemon.config.read_text().count(SECRET) == 3
    kept = [path for path in daemon.state.rglob("*") if path.is_file()]
    assert kept and not any(SECRET.encode() in path.read_bytes() for path in [*kept, daemon.log]), "no secret is kept or told"


def test_what_cannot_run_fails_alone_and_the_status_says_what_is_not_in_force(daemon: Daemon, tiny_model: Path) -> None:
    write(daemon, pools(tiny_model, a=64, b=64))
    daemon.start()
    before = all_ready(daemon, "a", "b")
    write(daemon, pools(Path("/nowhere/m.gguf"), a=64) + pools(tiny_model, b=128, c=64).partition("\n")[2])
    failed = command(daemon, "apply", "--yes")
    assert failed.returncode == 1 and "1 of 3 pools (a), the others stand" in failed.stderr, failed.stdout + failed.stderr
    after = all_ready(daemon, "a", "b", "c")
    assert after["a"] == before["a"] and size(daemon, "b") == "128"
    assert "/nowhere/m.gguf" in daemon.status("a")["unapplied"] and daemon.status("b")["unapplied"] is None
    (operation,) = [one for one in daemon.get("/v1/operations")[1] if one["kind"] == "apply"]
    assert operation["status"] == "failed" and operation["error"]["details"]["pools"]["a"]["status"] == "failed"
    write(daemon, pools(tiny_model, b=128, c=64))
    gone = command(daemon, "apply", "--yes", "--prune")
    assert gone.returncode == 0 and "a  remove succeeded" in gone.stdout, gone.stderr
    assert daemon.get("/v1/pools/a")[0] == 404 and not Path(f"/proc/{before['a']}").exists()


def test_another_file_takes_the_place_of_the_daemons_own(daemon: Daemon, tiny_model: Path, open_dir: Path) -> None:
    write(daemon, pools(tiny_model, a=64))
    daemon.start()
    pid = all_ready(daemon, "a")["a"]
    other = open_dir / "other.yaml"
    other.write_text(daemon.config.read_text() + pools(tiny_model, b=64).partition("\n")[2])
    plan = json.loads(command(daemon, "apply", "-f", str(other), "--dry-run", "-o", "json").stdout)
    assert plan["replaces_file"] and plan["file"] == str(daemon.config) and [row["action"] for row in plan["pools"]] == ["add"]
    done = command(daemon, "apply", "-f", str(other), "--yes")
    assert done.returncode == 0, done.stderr
    assert daemon.config.read_text() == other.read_text()
    assert all_ready(daemon, "a", "b")["a"] == pid
    daemon.kill()
    daemon.start()
    assert all_ready(daemon, "a", "b")["a"] == pid, "the next daemon starts with the same"
    other.write_text("pools: [")
    wrong = command(daemon, "apply", "-f", str(other), "--yes")
    assert wrong.returncode == 4 and daemon.config.read_text() != other.read_text()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "place", [pytest.param("apply.begun", marks=SLOW), "apply.step", pytest.param("reload.proven", marks=SLOW)]
)
def test_a_daemon_that_dies_in_an_apply_is_followed_by_one_that_goes_by_the_file(
    daemon: Daemon, tiny_model: Path, place: str
) -> None:
    """What it left running as it was is named, and the next apply replaces it."""
    daemon.env |= {"POOL_MANAGERD_TEST_FAILPOINTS": "1", "PM_FAILPOINTS": f"{place}=panic"}
    write(daemon, pools(tiny_model, a=64, b=64, c=64))
    daemon.start()
    before = all_ready(daemon, "a", "b", "c")
    write(daemon, pools(tiny_model, a=128, b=128, c=64))
    accepted: dict[str, Any] = {}
    with suppress(OSError):  # dead before it could answer
        accepted = daemon.post("/v1/apply", {})[1]
    assert daemon.process is not None
    assert daemon.process.wait(30) == -9, "it died there"
    daemon.env = {}
    daemon.start()
    between = all_ready(daemon, "a", "b", "c")
    assert between["c"] == before["c"] and between["b"] == before["b"], "what was not reached runs on"
    assert accepted or place == "apply.begun"
    if accepted:
        ended = daemon.get(f"/v1/operations/{accepted['operation_id']}")[1]
        assert ended["status"] == "failed" and "started by its file" in ended["error"]["message"]
    done = command(daemon, "apply", "--yes")
    assert done.returncode == 0, done.stderr
    after = all_ready(daemon, "a", "b", "c")
    assert (size(daemon, "a"), size(daemon, "b"), after["c"]) == ("128", "128", before["c"])
    assert command(daemon, "apply", "--dry-run").returncode == 0


def test_a_watched_file_is_applied_when_it_changes(daemon: Daemon, tiny_model: Path) -> None:
    write(daemon, pools(tiny_model, a=64))
    daemon.start(more=("--watch",))
    pid = all_ready(daemon, "a")["a"]
    write(daemon, "pools: [")
    wait_until(lambda: daemon.lines("config_reread") != [], "the change to be seen", 20)
    assert daemon.lines("config_reread")[-1]["outcome"] == "error"
    write(daemon, pools(tiny_model, a=64, b=64))
    wait_until(lambda: daemon.get("/v1/pools/b")[0] == 200, "the new pool", 20)
    assert all_ready(daemon, "a", "b")["a"] == pid


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_asks(daemon: Daemon, tiny_model: Path, answer: bytes, code: int) -> None:
    write(daemon, pools(tiny_model, a=64))
    daemon.start()
    pid = all_ready(daemon, "a")["a"]
    write(daemon, pools(tiny_model, a=128))
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "pool_managerd.cli", "apply", "--url", f"http://127.0.0.1:{daemon.port}"]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    told = b""
    while b"Apply it?" not in told:
        told += os.read(ours, 4096)
    os.write(ours, answer)
    try:
        while True:
            told += os.read(ours, 4096)
    except OSError:
        os.close(ours)  # it has ended
    assert process.wait(60) == code, told
    assert (all_ready(daemon, "a")["a"] == pid) is (code == 1)


def test_what_cannot_be_applied_is_refused_as_a_whole(daemon: Daemon, tiny_model: Path) -> None:
    daemon.start()
    daemon.preload("q", "--model", "x")
    code, found = daemon.post("/v1/apply?dry_run=true", {"text": daemon.config.read_text() + pools(tiny_model, q=64)})
    assert code == 409 and "pool 'q' is there already" in found["message"], found
    assert daemon.post("/v1/apply", {"text": "x", "number": 1})[0] == 400
    assert daemon.post("/v1/apply", {"number": 99})[0] == 404


def test_a_reload_by_hand_is_in_the_plan_and_a_file_that_is_gone_comes_back(daemon: Daemon, tiny_model: Path) -> None:
    write(daemon, pools(tiny_model, a=64))
    text = daemon.config.read_text()
    daemon.start()
    all_ready(daemon, "a")
    assert command(daemon, "reload", "a", "--set", "ctx=128").returncode == 0
    plan = command(daemon, "apply", "--dry-run")
    assert plan.returncode == 0 and "= a: runs with ctx=128 by hand, the file says 64; reload a --reset" in plan.stdout, (
        plan.stderr
    )
    daemon.config.write_text(text + "# not applied\n")
    replaced = command(daemon, "config", "rollback", "1", "--yes")
    assert replaced.returncode == 0 and "they are overwritten, and kept in the history" in replaced.stdout, replaced.stderr
    daemon.config.unlink()
    back = command(daemon, "config", "rollback", "1", "--yes")
    assert back.returncode == 0 and daemon.config.read_text() == text, back.stderr
    listed = json.loads(command(daemon, "config", "history", "-o", "json").stdout)
    assert [(row["origin"], row["result"]) for row in listed][1:] == [("edit", "not applied"), ("rollback", "done")]
