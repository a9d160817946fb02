"""A reload against a real daemon and real processes: seen from outside, and over the daemon's death at every step of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.failpoints import PLACES
from tests.conftest import wait_until
from tests.system.daemons import Daemon, engine
from tests.system.nodes import left_behind, mentioning

RULES = "reload: {bake_ms: 300}\n"
BESIDE = ("reload.asleep", "reload.loading", "reload.loaded", "reload.taken_over")
IN_PLACE = ("reload.asleep", "reload.draining", "reload.switching", "reload.switched")
TELLING = ("reload.loaded", "reload.switched", "reload.undoing")
"""The steps after which most is different; the others are slow."""


def steps(not_in: tuple[str, ...]) -> list[Any]:
    """Where a daemon may die in a reload."""
    places = (place for place in PLACES if place.startswith("reload.") and place not in not_in)
    return [pytest.param(place, marks=() if place in TELLING else pytest.mark.slow) for place in places]


OLD, NEW = ("--model", "old.gguf"), ("--model", "new.gguf")


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    made = Daemon(open_dir / "d", RULES)
    yield made
    made.end()


def runs(daemon: Daemon) -> str:
    """Which engine runs, by its own command line."""
    argv = Path(f"/proc/{daemon.status()['pid']}/cmdline").read_bytes().split(b"\0")
    return argv[argv.index(b"--model") + 1].decode()


def ended(daemon: Daemon, operation: str) -> dict[str, Any]:
    def body() -> dict[str, Any]:
        return dict(daemon.get(f"/v1/operations/{operation}")[1])

    wait_until(lambda: body()["status"] != "running", "the reload to end", 30)
    return body()


def test_another_engine_takes_over_and_one_that_cannot_run_does_not(daemon: Daemon) -> None:
    daemon.start().preload("p", *OLD)
    before = daemon.status()
    code, done = daemon.post("/v1/pools/p/reload?wait=true", {"engine": engine(*NEW, slots_total=3)})
    assert code == 200 and done["outcome"]["rolled_back"] is False and done["outcome"]["downtime_ms"] > 0, done
    after = daemon.status()
    assert runs(daemon) == "new.gguf" and after["epoch"] == before["epoch"] + 1 and after["slots_total"] == 3
    code, failed = daemon.post("/v1/pools/p/reload?wait=true", {"engine": engine("--model", "x", "--exit-after", "0")})
    assert code == 500 and failed["message"].startswith("reload failed: ") and failed["details"]["rolled_back"] is True, failed
    assert runs(daemon) == "new.gguf" and daemon.status()["ready"]
    daemon.kill()
    daemon.start()
    daemon.until(lambda status: bool(status["ready"]), "the engine to be adopted")
    assert runs(daemon) == "new.gguf"
    text = daemon.get("/metrics")[1]
    assert 'reload_failure_total{pool_id="p"' not in text, "a daemon counts what it saw"


def stream(url: str, told: list[bytes]) -> None:
    """A client that takes no lease: what it was told, to the end."""
    body = json.dumps({"prompt": "x", "max_tokens": 40, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        told.append(answer.readline())
        told.append(answer.read())


@pytest.mark.parametrize("change", ["drain", "reload"])
def test_a_request_without_a_lease_ends_before_its_engine_does(daemon: Daemon, change: str) -> None:
    daemon.start().preload("p", *OLD, "--token-ms", "40")
    told: list[bytes] = []
    client = threading.Thread(target=stream, args=(daemon.status()["url"], told))
    client.start()
    try:
        wait_until(lambda: bool(told), "the first token", 10)
        body = {"engine": engine(*NEW)} if change == "reload" else {"deadline_ms": 10_000}
        code, done = daemon.post(f"/v1/pools/p/{change}?wait=true", body)
        assert code == 200, done
    finally:
        client.join(20)
    assert told[-1].rstrip().endswith(b"data: [DONE]"), "it was answered in full"
    if change == "drain":
        assert done["outcome"]["force_stopped"] is False and done["outcome"]["duration_ms"] > 500
    else:
        assert runs(daemon) == "new.gguf"


def test_a_request_without_a_lease_is_waited_for_by_the_next_daemon_too(daemon: Daemon) -> None:
    daemon.start().preload("p", *OLD, "--token-ms", "250")
    told: list[bytes] = []
    client = threading.Thread(target=stream, args=(daemon.status()["url"], told))
    client.start()
    try:
        wait_until(lambda: bool(told), "the first token", 10)
        drain = daemon.post("/v1/pools/p/drain", {"deadline_ms": 20_000})[1]["operation_id"]
        assert daemon.status()["draining"]
        daemon.kill()
        daemon.start()
        daemon.until(lambda status: bool(status["drain"] and status["drain"]["requests"] == 1), "the drain to go on")
        assert ended(daemon, drain)["outcome"]["force_stopped"] is False
    finally:
        client.join(20)
    assert told[-1].rstrip().endswith(b"data: [DONE]"), "it was answered in full"
    assert [line["left"] for line in daemon.lines("drain_progress")] == [1] * len(daemon.lines("drain_progress"))


@pytest.mark.parametrize("step", steps(not_in=BESIDE))
def test_a_daemon_that_dies_in_a_reload_is_followed_by_one_that_undoes_it_or_had_committed_it(daemon: Daemon, step: str) -> None:
    """One lease is held while it drains, so that it can die there; the undoing is that of an engine that ends at once."""
    daemon.env |= {"POOL_MANAGERD_TEST_FAILPOINTS": "1", "PM_FAILPOINTS": f"{step}=panic"}
    daemon.start().preload("p", *OLD)
    new = engine("--exit-after", "0", "--model", "x") if step == "reload.undoing" else engine(*NEW)
    code, accepted = daemon.post("/v1/pools/p/reload", {"engine": new}) if step != "reload.staging" else (202, {})
    if step == "reload.staging":
        with pytest.raises(OSError):
            daemon.post("/v1/pools/p/reload?wait=true", {"engine": new})
    assert code == 202, accepted
    assert daemon.process is not None
    assert daemon.process.wait(20) == -9, "it died there"
    daemon.env = {}
    daemon.start()
    daemon.until(lambda status: bool(status["ready"] and not status["draining"]), "one of the two to serve")
    committed = step == "reload.committed"
    assert runs(daemon) == ("new.gguf" if committed else "old.gguf")
    if accepted:
        found = ended(daemon, accepted["operation_id"])
        assert found["status"] == "succeeded" if committed else found["error"]["message"].startswith("reload failed"), found
    code, again = daemon.post("/v1/pools/p/reload?wait=true", {"engine": engine(*NEW)})
    assert code == 200 and runs(daemon) == "new.gguf", again


def weighed(folder: Path) -> dict[str, Any]:
    """What says of an engine how much memory it needs, so that two of them are known to fit."""
    model = folder / "model.bin"
    model.write_bytes(bytes(1 << 20))
    model.chmod(0o644)
    return {"model_path": str(model)}


def test_two_engines_side_by_side_until_the_last_lease_of_the_old_one_has_ended(daemon: Daemon, open_dir: Path) -> None:
    size = weighed(open_dir)
    daemon.start().preload("p", *OLD, **size)
    before = daemon.status()
    lease = daemon.post("/v1/pools/p/leases", {})[1]["lease_id"]
    body = {"engine": engine(*NEW, **size), "drain_deadline_ms": 60_000}
    code, done = daemon.post("/v1/pools/p/reload?wait=true", body)
    assert code == 200 and (done["outcome"]["strategy"], done["outcome"]["downtime_ms"]) == ("blue_green", 0), done
    after = daemon.status()
    assert runs(daemon) == "new.gguf" and after["replica_id"] == "r1" and after["pid"] != before["pid"]
    assert after["beside"]["role"] == "retiring" and after["beside"]["pid"] == before["pid"] and after["active_leases"] == 1
    daemon.kill()
    daemon.start()
    daemon.until(lambda status: bool(status["ready"] and status["beside"]), "both engines to be adopted")
    kept = daemon.status()
    assert (kept["pid"], kept["beside"]["pid"], kept["beside"]["active_leases"]) == (after["pid"], before["pid"], 1)
    assert daemon.delete(f"/v1/pools/p/leases/{lease}")[0] == 200
    daemon.until(lambda status: status["beside"] is None, "the old engine to end")
    assert runs(daemon) == "new.gguf" and not Path(f"/proc/{before['pid']}").exists()
    code, failed = daemon.post("/v1/pools/p/reload?wait=true", {"engine": engine("--model", "x", "--exit-after", "0", **size)})
    assert code == 500 and failed["message"].endswith("what ran before has served all along"), failed
    assert daemon.status()["pid"] == after["pid"]


@pytest.mark.parametrize("step", steps(not_in=IN_PLACE))
def test_a_daemon_that_dies_with_two_engines_is_followed_by_one_that_goes_on_with_the_right_ones(
    daemon: Daemon, open_dir: Path, step: str
) -> None:
    """A lease is held on the old engine, which must outlive all of it."""
    size = weighed(open_dir)
    daemon.env |= {"POOL_MANAGERD_TEST_FAILPOINTS": "1", "PM_FAILPOINTS": f"{step}=panic"}
    daemon.start().preload("p", *OLD, **size)
    before = daemon.status()
    lease = daemon.post("/v1/pools/p/leases", {})[1]["lease_id"]
    new = engine("--exit-after", "0", "--model", "x", **size) if step == "reload.undoing" else engine(*NEW, **size)
    with suppress(OSError):
        daemon.post("/v1/pools/p/reload", {"engine": new})
    assert daemon.process is not None
    assert daemon.process.wait(20) == -9, "it died there"
    daemon.env = {}
    daemon.start()
    daemon.until(lambda status: bool(status["ready"]), "one of the two to serve")
    done, status = step in ("reload.committed", "reload.taken_over"), daemon.status()
    assert runs(daemon) == ("new.gguf" if done else "old.gguf") and status["active_leases"] == 1
    assert (status["beside"] or status)["pid"] == before["pid"] and (status["beside"] is not None) is done
    assert daemon.delete(f"/v1/pools/p/leases/{lease}")[0] == 200
    daemon.until(lambda status: status["beside"] is None, "what was replaced to end")
    code, again = daemon.post("/v1/pools/p/reload?wait=true", {"engine": engine("--model", "third", **size)})
    assert code == 200 and runs(daemon) == "third", again
    daemon.terminate()
    assert left_behind(daemon.folder) == [] and mentioning(daemon.folder) == []


def test_what_the_command_shows(daemon: Daemon, tiny_model: Path) -> None:
    pool = f'pools:\n  - {{id: chat, engine: llamacpp, model: "file:{tiny_model}", ctx: 64, preload: false}}\n'
    daemon.config.write_text(daemon.config.read_text() + pool)
    daemon.start()

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "pool_managerd.cli", "reload", "chat", *words, "--url", f"http://127.0.0.1:{daemon.port}"]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    plan = command("--set", "ctx=128", "--plan")
    assert plan.returncode == 0 and "ctx: 64 -> 128" in plan.stdout and "not known yet" in plan.stdout, plan.stderr
    done = command("--set", "ctx=128", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"]["rolled_back"] is False
    argv = daemon.get("/v1/pools/chat/command")[1]["argv"]
    assert argv[argv.index("--ctx-size") + 1] == "128"
    wrong = command("--set", "ctx=-1")
    assert wrong.returncode == 4 and "ctx: cannot use -1" in wrong.stderr
    nothing = command()
    assert nothing.returncode == 2 and "nothing is to change" in nothing.stderr
