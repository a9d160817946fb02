"""What the daemon must not do, show or need: tokens, secrets, addresses, users, closed outputs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pool_managerd.runtime import procfs
from tests.conftest import wait_until
from tests.system.daemons import Daemon, engine
from tests.system.nodes import alive, mentioning

Make = Callable[..., Daemon]
TOKEN = "canary-token-0123456789-abcdefghij"
SECRET = "canary-env-5ecret-value"


AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")

SLOW = pytest.mark.slow


def parent_of(pid: int) -> int:
    found = procfs.stat(pid)
    assert found is not None
    return found.parent_pid


@pytest.fixture
def make(open_dir: Path) -> Iterator[Make]:
    """Daemons that end with the test."""
    made: list[Daemon] = []

    def daemon(*given: str, name: str = "d", **how: str) -> Daemon:
        made.append(Daemon(open_dir / name, *given, **how))
        return made[-1]

    yield daemon
    for one in made:
        one.end()


@pytest.mark.parametrize("bind", ["0.0.0.0", "[::]"])
def test_an_address_that_others_reach_is_refused_without_a_token_or_with_a_short_one(make: Make, bind: str) -> None:
    daemon = make(bind=bind)
    assert daemon.launch().wait(30) == 2
    assert "without a token" in daemon.text() and daemon.lines("startup_bind_refused")
    daemon.env["AUTH_TOKEN"] = "short"
    assert daemon.launch().wait(30) == 2
    assert "32" in daemon.text() and "short" not in "".join(line["human"] for line in daemon.lines())
    assert not daemon.state.exists() or not list(daemon.state.glob("state.db")), "nothing was begun"


def test_the_token_is_asked_for_everywhere_but_at_the_open_paths(make: Make) -> None:
    daemon = make(AUTH_TOKEN=TOKEN).start()
    for path in ("/health", "/ready", "/metrics"):
        assert daemon.get(path)[0] in (200, 503), path
    described = [
        (path, method) for path, methods in json.loads(json.dumps(_openapi(daemon)))["paths"].items() for method in methods
    ]
    assert len(described) > 20
    for path, method in described:
        if path.rsplit("/", 1)[-1] in ("health", "ready", "metrics") and "pools" not in path:
            continue
        code, answer = daemon.call(
            method.upper(), path.format(pool_id="p", lease_id="x", operation_id="x", ticket_id="x", device="0")
        )
        assert (code, answer["code"]) == (401, "MISSING_TOKEN"), (method, path)
    wrong = [TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "", "x" * 5000, TOKEN.replace("c", "ç", 1).encode().decode("latin-1")]
    for given in wrong:
        code, answer = daemon.call("GET", "/v1/pools", headers={"Authorization": f"Bearer {given}"})
        assert code == 401 or (code == 400 and len(given) > 4000), (given[:50], code, answer)
    for scheme in ("Basic", "bearer", "BEARER"):
        code = daemon.call("GET", "/v1/pools", headers={"Authorization": f"{scheme} {TOKEN}"})[0]
        assert code == (401 if scheme == "Basic" else 200), scheme
    daemon.token = TOKEN
    assert daemon.get("/v1/pools") == (200, [])


def _openapi(daemon: Daemon) -> object:
    code, document = daemon.call("GET", "/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"})
    assert code == 200
    return document


def test_web_pages_cannot_call_it(make: Make) -> None:
    daemon = make().start()
    assert daemon.call("GET", "/v1/pools", headers={"Origin": "http://evil.example"})[0] == 403
    assert daemon.call("GET", "/v1/pools", headers={"Host": "evil.example:9200"})[0] == 421
    body = json.dumps(engine()).encode()
    code, _ = daemon.call("POST", "/v1/pools/p/preload", body, {"Content-Type": "text/plain"})
    assert code == 415 and daemon.get("/v1/pools") == (200, [])
    assert daemon.call("OPTIONS", "/v1/pools", headers={"Origin": "http://evil.example"})[0] in (403, 405)


def test_no_secret_is_shown_anywhere(make: Make) -> None:
    daemon = make(AUTH_TOKEN=TOKEN).start()
    daemon.token = TOKEN
    env = {"HF_TOKEN": SECRET, "MY_PASSWORD": SECRET, "OPENAI_API_KEY": SECRET}
    daemon.preload("p", env=env)
    assert daemon.post("/v1/pools/bad/preload", engine(env=env) | {"binary_path": "/nowhere/engine"})[0] == 500
    assert daemon.post("/v1/pools/odd/preload", engine(env=env, typo=1))[0] == 400
    daemon.call("GET", f"/v1/pools?token={TOKEN}", headers={"X-Correlation-Id": f"{TOKEN}\x7f"})
    os.kill(daemon.status()["pid"], 9)
    daemon.until(lambda s: s["ready"] and s["crash_count"] == 1, "the crash")
    reads = ["/metrics", "/v1/events?after=0&follow=false", "/v1/operations", "/v1/snapshots", "/v1/capabilities", "/v1/crashes"]
    reads += [f"/v1/pools/p/{what}" for what in ("status", "health", "command", "explain", "logs", "crashes", "leases")]
    reads += ["/v1/pools", "/openapi.json", "/v1/pools/bad/command", "/v1/pools/bad/status"]
    for path in reads:
        answer = str(daemon.get(path)[1])
        assert TOKEN not in answer and SECRET not in answer, path
    assert '"HF_TOKEN": "***"' in json.dumps(daemon.get("/v1/pools/p/command")[1])
    wait_until(lambda: bool(daemon.lines("restart")), "the log to be written", 15)
    assert TOKEN not in daemon.text() and SECRET not in daemon.text()
    for file in daemon.run.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes() and SECRET.encode() not in file.read_bytes(), file
    for place in daemon.state.iterdir():
        assert place.stat().st_mode & 0o077 == 0 or SECRET.encode() not in place.read_bytes(), place
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            assert TOKEN.encode() not in line and SECRET.encode() not in line, line
    assert TOKEN.encode() not in Path(f"/proc/{daemon.status()['pid']}/environ").read_bytes()


def test_it_works_as_a_normal_user(make: Make) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becoming another user needs root and setpriv")
    daemon = make()
    os.chown(daemon.folder, 65534, 65534)
    daemon.start(wrap=AS_NOBODY)
    assert daemon.process is not None
    pid = daemon.preload("p", "--fork-grandchildren", "1", "--setsid")["pid"]
    assert Path(f"/proc/{pid}").stat().st_uid == 65534 and daemon.status()["isolation"] == "none"
    shim = parent_of(pid)
    own = (daemon.process.pid, shim, parent_of(shim))
    for private in (f"/proc/{other}/{entry}" for other in own for entry in ("environ", "mem")):
        reading = subprocess.run([*AS_NOBODY, "head", "-c1", private], capture_output=True, check=False)
        assert b"Permission denied" in reading.stderr, (private, reading)
    os.kill(pid, 9)
    daemon.until(lambda s: s["ready"] and s["pid"] != pid, "the restart")
    again = daemon.status()["pid"]
    assert daemon.post("/v1/pools/p/drain?wait=true")[0] == 200 and not alive(again)
    assert daemon.terminate() == 0 and mentioning(daemon.folder) == []


@pytest.mark.parametrize(
    ("place", "refusal"),
    [
        ("mkdir gone && cd gone && rmdir ../gone", "the current directory is gone"),
        ("mount -t tmpfs none /proc", "cannot run here: /proc is not mounted, or shows another pid namespace"),
    ],
)
def test_a_place_that_nothing_can_be_told_of_is_refused_in_a_sentence(make: Make, place: str, refusal: str) -> None:
    refused(make(), f'{place} && exec "$@"', refusal)


def test_a_proc_of_another_pid_namespace_is_refused(make: Make) -> None:
    refused(make(), 'exec unshare --pid --fork --kill-child "$@"', "shows another pid namespace")


def refused(daemon: Daemon, script: str, refusal: str) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("namespaces need root and unshare")
    process = daemon.launch(wrap=("unshare", "-m", "sh", "-c", script, "sh"))
    assert process.wait(20) in (1, 2)
    assert refusal in daemon.text() and "Traceback" not in daemon.text(), daemon.text()


def test_directories_that_everybody_may_write_are_closed_and_said_and_modes_are_ours_whatever_the_umask(make: Make) -> None:
    daemon = make()
    for loose in (daemon.run, daemon.run / "shims", daemon.state):
        loose.mkdir()
        loose.chmod(0o777)
    daemon.start(umask=0)
    daemon.preload("p")
    writable = [path for path in daemon.folder.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    assert writable == []
    told = " ".join(line["human"] for line in daemon.lines("notice"))
    assert all(f"{loose} could be written by other users" in told for loose in (daemon.run, daemon.run / "shims", daemon.state))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    "foreign",
    ["state/state.db", "run", *(pytest.param(place, marks=SLOW) for place in ("state", "run/shims", "run/work", "run/engines"))],
)
def test_what_belongs_to_another_user_is_refused_with_the_command_to_type(make: Make, foreign: str) -> None:
    daemon = make()
    path = daemon.folder / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"") if path.suffix else path.mkdir()
    os.chown(path, 65534, 65534)
    assert daemon.launch().wait(20) == 1
    assert str(path) in daemon.text() and "belongs to uid 65534" in daemon.text()
    assert "chown" in daemon.text()
    os.chown(path, 0, 0)
    daemon.start()


@pytest.mark.parametrize("closed", [">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "2>&1 | head -c 1 >/dev/null"])
def test_a_closed_or_full_output_does_not_end_it_or_reach_its_files(make: Make, closed: str) -> None:
    daemon = make()
    script = f'exec "$@" {closed}' if "|" not in closed else f'"$@" {closed}'
    daemon.start(wrap=("bash", "-c", script, "bash"))
    pid = daemon.preload("p", "--spam-mb-s", "1")["pid"]
    os.kill(pid, 9)
    daemon.until(lambda s: s["ready"] and s["pid"] != pid, "the restart")
    for _ in range(20):
        daemon.call("GET", "/v1/nonsense", b"\xff", {"Origin": "http://x"})
    holder = (daemon.state / "daemon.lock").read_text()
    assert holder.strip().isdigit(), "no output was written into the lock file"
    leader = int(holder)
    if os.geteuid() == 0:  # nobody else may look
        standard = {str(Path(f"/proc/{leader}/fd/{fd}").readlink()) for fd in (0, 1, 2)}
        assert standard.isdisjoint(str(path) for folder in (daemon.state, daemon.run) for path in folder.rglob("*"))
    os.kill(leader, 15)
    wait_until(lambda: not alive(leader), "the daemon to end", 10)
    wait_until(lambda: mentioning(daemon.folder) == [], "its shell to end", 10)


def test_hostile_bytes_get_an_error_and_change_nothing(make: Make) -> None:
    daemon = make().start()
    head = f"POST /v1/pools/p/preload HTTP/1.1\r\nHost: 127.0.0.1:{daemon.port}\r\nContent-Type: application/json\r\n"
    deep = b"[" * 100_000
    digits = b'{"port": ' + b"9" * 100_000 + b"}"
    for raw in (
        b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"/a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        head.encode() + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        head.encode() + b"Content-Length: -1\r\n\r\n", head.encode() + b"Content-Length: 99999999999\r\n\r\n",
        head.encode() + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        head.encode() + f"Content-Length: {len(deep)}\r\n\r\n".encode() + deep,
        head.encode() + f"Content-Length: {len(digits)}\r\n\r\n".encode() + digits,
    ):  # fmt: skip
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=5) as client:
            try:
                client.sendall(raw)
                first = client.recv(100)
            except ConnectionResetError:
                first = b""
        assert not first or first.split()[1][:1] == b"4", (raw[:60], first)
        assert time.monotonic() - started < 2
    assert daemon.get("/v1/pools") == (200, [])
    assert not [line for line in daemon.lines() if line["level"] in ("error", "critical")]
