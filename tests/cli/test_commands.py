"""The commands against a real server on loopback: what they print, and their exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pool_managerd.api.auth import Access, Token
from pool_managerd.cli.client import find_daemon
from pool_managerd.cli.main import app, run
from pool_managerd.cli.reconnect import sse_events
from pool_managerd.core.baselines import Baseline
from pool_managerd.errors import EngineError
from tests.api.conftest import Served, close, serve
from tests.api.fake_node import FakeNode

TOKEN = "t" * 40
Invoke = Callable[..., tuple[int, str, str]]


class Server:
    """The fake node's server in its own thread and loop, so that the commands can block."""

    def __init__(self, access: Access | None = None, bind: str = "127.0.0.1:0") -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.served: Served = self._do(self._open(access, bind))
        self.node = self.served.node

    @staticmethod
    async def _open(access: Access | None, bind: str) -> Served:
        return await serve(FakeNode(), access, bind=bind)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def soon(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.loop.call_soon_threadsafe(call, *arguments)

    def close(self) -> None:
        self._do(close(self.served))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def invoke(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run one command as a person would; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POOL_MANAGERD_URL", server.served.url)
    for name in ("AUTH_TOKEN", "LLORCH_API_TOKEN", "POOL_MANAGERD_TOKEN_FILE", "POOL_MANAGERD_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pool-managerd", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call


def test_pools_are_a_table_for_people_and_the_answer_itself_for_machines(invoke: Invoke, server: Server) -> None:
    server.node.add("broken", state="failed", ready=False, live=False, last_error="it \x1b[31mfell\nover")
    code, out, _ = invoke("pools")
    assert code == 0
    assert "demo" in out
    assert "it �[31mfell over" in out
    code, out, _ = invoke("pools", "-o", "json")
    assert [pool["pool_id"] for pool in json.loads(out)] == ["broken", "demo"]


def test_an_engine_that_does_not_run_runs_on_nothing(invoke: Invoke, server: Server) -> None:
    server.node.pools["demo"] |= {"compute": "gpu", "devices": [{"device": "0"}, {"device": "1"}]}
    assert "runs on    GPU 0, GPU 1\n" in invoke("status", "demo")[1]
    server.node.pools["demo"] |= {"state": "offline", "live": False, "ready": False}
    assert "runs on" not in invoke("status", "demo")[1]


def test_a_remedy_that_the_message_holds_is_not_repeated(invoke: Invoke, server: Server) -> None:
    server.node.fail_next = EngineError("preload failed: it needs 8 GiB (free memory there)", hint="free memory there")
    assert invoke("status", "demo")[2] == "preload failed: it needs 8 GiB (free memory there)\n"


def test_status_says_by_its_exit_code_whether_the_pool_is_ready(invoke: Invoke, server: Server) -> None:
    assert invoke("status", "demo")[0] == 0
    server.node.pools["demo"]["ready"] = False
    code, out, _ = invoke("status", "demo", "-o", "json")
    assert code == 1
    assert json.loads(out)["ready"] is False


def test_status_says_with_what_each_figure_was_measured_and_when(invoke: Invoke, server: Server) -> None:
    def told() -> list[str]:
        return [line for line in invoke("status", "demo")[1].splitlines() if "tokens/s" in line]

    (warm,) = told()
    assert warm.startswith("warm-up") and "first token after 5 ms, 90.0 tokens/s (warm-up of 16 tokens, " in warm
    bench = Baseline(40.0, 55.0, 3, "bench of 128 tokens behind a prompt of 512, 3 runs", None, {})
    server.node.pools["demo"]["baselines"].insert(0, bench.to_dict())
    first, second = told()
    assert first.startswith("bench") and second == warm
    assert first.endswith("first token after 40 ms, 55.0 tokens/s (bench of 128 tokens behind a prompt of 512, 3 runs)")


def test_status_says_what_was_given_back_or_that_it_is_not_known(invoke: Invoke, server: Server) -> None:
    def told(slots: int | None, tokens: int | None) -> list[str]:
        server.node.pools["demo"]["cache"] = {"restored_slots": slots, "restored_tokens": tokens, "lost": None}
        return [line for line in invoke("status", "demo")[1].splitlines() if line.startswith("given back")]

    assert told(2, 2003) == ["given back  2 slots, 2003 tokens"]
    assert told(None, None) == ["given back  not known since the daemon was started again"]
    assert told(0, 0) == []


def test_a_pool_that_is_not_known_is_refused(invoke: Invoke) -> None:
    for command in ("status", "command", "leases", "logs", "start", "drain", "explain", "crashes"):
        code, _, err = invoke(command, "nope")
        assert (code, err.splitlines()[0]) == (4, "pool nope not found"), command
    assert invoke("status", "../../etc/passwd")[0] == 4


def test_each_pool_that_is_not_known_is_told(invoke: Invoke) -> None:
    code, out, err = invoke("status", "nope", "demo", "neither")
    assert code == 4 and "demo" in out
    assert [line for line in err.splitlines() if "not found" in line] == ["pool nope not found", "pool neither not found"]


@pytest.mark.parametrize(
    "command", [["command", "demo"], ["leases", "demo"], ["crashes"], ["crashes", "demo"], ["explain"], ["explain", "demo"]]
)
def test_reads_answer_in_both_forms(invoke: Invoke, command: list[str]) -> None:
    code, out, _ = invoke(*command)
    assert (code, bool(out)) == (0, True)
    code, out, _ = invoke(*command, "-o", "json")
    assert code == 0
    json.loads(out)


@pytest.mark.parametrize("command", ["start", "stop", "restart", "preload", "drain", "undrain", "hold", "release"])
def test_changes_wait_for_their_outcome(invoke: Invoke, server: Server, command: str) -> None:
    code, out, _ = invoke(command, "demo")
    assert (code, out.splitlines()[0]) == (0, f"{command} of pool demo: succeeded")
    assert server.node.calls == [(command, "demo")]


def test_the_breaker_is_reset_and_a_deadline_is_passed_on(invoke: Invoke, server: Server) -> None:
    assert invoke("breaker", "reset", "demo")[0] == 0
    code, out, _ = invoke("drain", "demo", "--deadline-ms", "77", "-o", "json")
    assert (code, json.loads(out)["outcome"]["duration_ms"]) == (0, 77)
    assert server.node.calls == [("reset_breaker", "demo"), ("drain", "demo")]


def test_progress_is_shown_while_it_waits_and_a_failure_is_a_1_with_its_remedy(invoke: Invoke, server: Server) -> None:
    server.node.auto = False
    server.node.pools["demo"]["preload"] = {
        "step": "model",
        "human": "Verifying the model file",
        "bytes_done": 50,
        "bytes_total": 100,
    }

    def fail_it() -> None:
        deadline = time.monotonic() + 5
        while not server.node.ops and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)  # let it poll at least once while the operation runs
        error = EngineError("preload failed: cannot run /x", hint="check the path")
        server.soon(server.node.ops["op-1"].result.set_exception, error)

    ender = threading.Thread(target=fail_it)
    ender.start()
    code, _, err = invoke("start", "demo")
    ender.join()
    assert code == 1
    assert err.splitlines() == ["demo: Verifying the model file (50 %)", "preload failed: cannot run /x", "hint: check the path"]


def test_not_waiting_shows_the_operation(invoke: Invoke, server: Server) -> None:
    server.node.auto = False
    code, out, _ = invoke("start", "demo", "--no-wait")
    assert (code, out) == (0, "start of pool demo: running\noperation op-1\n")


def test_a_prepared_engine_is_read_from_a_file(invoke: Invoke, server: Server, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"binary_path": "/bin/engine", "port": 1}')
    assert invoke("preload", "new", "--file", "engine.json")[0] == 0
    assert server.node.submitted[0] is not None
    assert server.node.submitted[0].binary_path == "/bin/engine"
    (tmp_path / "bad.json").write_text("[1]")
    assert invoke("preload", "new", "--file", "bad.json")[0] == 2
    assert invoke("preload", "new", "--file", "missing.json")[0] == 2


def test_logs_and_events_end_when_they_are_not_followed(invoke: Invoke, server: Server, tmp_path: Path) -> None:
    server.node.log_file = tmp_path / "engine.log"
    server.node.log_file.write_text("first line\nsecond line\n")
    assert invoke("logs", "demo", "-n", "1")[1] == "second line\n"
    assert json.loads(invoke("logs", "demo", "-o", "json")[1]) == {"pool_id": "demo", "lines": ["first line", "second line"]}
    server.soon(lambda: server.node.events.publish("crash", "demo", human="It fell", exit_code=3))
    assert "It fell" in invoke("events")[1]
    (line,) = invoke("events", "-o", "json")[1].splitlines()
    assert json.loads(line)["exit_code"] == 3


def test_an_event_that_arrives_in_pieces_is_put_together() -> None:
    stream = [b"retry: 1000\n\n: still", b' here\n\nid: 1\nevent: x\ndata: {"a"', b": 1}\n", b'\ndata: {"a": 2}\n\ndata: {"a"']
    assert [event["a"] for event in sse_events(stream)] == [1, 2]


def test_an_unreachable_daemon_is_a_3_with_the_remedy(invoke: Invoke) -> None:
    code, _, err = invoke("pools", "--url", "http://127.0.0.1:1")
    assert code == 3
    assert "cannot reach the daemon at http://127.0.0.1:1" in err
    assert "pool-managerd serve" in err
    assert invoke("pools", "--url", "ftp://x")[0] == 2


def test_usage_errors_are_a_2(invoke: Invoke) -> None:
    for arguments in (
        ["start"],
        ["stop", "demo", "--all"],
        ["wait", "demo", "--timeout", "soon"],
        ["wait", "demo", "--for", "rain"],
        ["events", "--level", "loud"],
        ["preload", "a", "b", "--file", "-"],
        ["nonsense"],
        ["drain", "demo", "--deadline-ms", "x"],
        ["reload", "demo", "--set", "ctx=1", "--strategy", "nonsense"],
        ["pools", "-o", "xml"],
        ["serve"],
        ["config", "check"],
    ):
        assert invoke(*arguments)[0] == 2, arguments
    told = invoke("reload", "demo", "--set", "ctx=1", "--strategy", "nonsense")[2]
    assert "'nonsense' is not one of 'blue_green', 'sleep_old', 'stop_start'" in told and "Value error" not in told
    assert "pool-managerd demo" in invoke("serve")[2]
    assert invoke("serve", "--config", "missing.yaml")[0] == 2


def test_the_token_comes_from_the_environment_and_a_wrong_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke, tmp_path: Path
) -> None:
    guarded = Server(Access("127.0.0.1", Token(TOKEN).digest))
    try:
        url = guarded.served.url
        code, _, err = invoke("pools", "--url", url)
        assert (code, "AUTH_TOKEN" in err) == (4, True)
        monkeypatch.setenv("AUTH_TOKEN", TOKEN)
        assert invoke("pools", "--url", url)[0] == 0
        (tmp_path / "token").write_text("wrong\n")
        monkeypatch.setenv("POOL_MANAGERD_TOKEN_FILE", str(tmp_path / "token"))
        assert invoke("pools", "--url", url)[0] == 4
        monkeypatch.setenv("POOL_MANAGERD_TOKEN_FILE", str(tmp_path / "none"))
        assert invoke("pools", "--url", url)[0] == 2
    finally:
        guarded.close()


def test_the_daemon_is_found_by_flag_environment_config_or_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_daemon(None, None, {}).url == "http://127.0.0.1:9200"
    config = tmp_path / "pool-managerd.yaml"
    config.write_text('daemon: {bind: "0.0.0.0:9333"}\nauth: {token_file: token}\n')
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert (find_daemon(None, None, {}).url, find_daemon(None, None, {}).token) == ("http://127.0.0.1:9333", TOKEN)
    (tmp_path / "other.toml").write_text('[daemon]\nbind = "[::1]:9444"\n')
    assert find_daemon(None, tmp_path / "other.toml", {}).url == "http://[::1]:9444"
    env = {"POOL_MANAGERD_URL": "http://example:1"}
    assert find_daemon(None, config, env).url == "http://example:1"
    assert find_daemon("http://flag:2", config, env).url == "http://flag:2"
    config.write_text("daemon: {bnd: x}\n")
    monkeypatch.delenv("POOL_MANAGERD_URL", raising=False)
    monkeypatch.setattr(sys, "argv", ["pool-managerd", "pools"])
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2


def test_a_configuration_is_checked(invoke: Invoke, tmp_path: Path) -> None:
    good, bad, open_bind = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "open.yaml"
    good.write_text('pools: [{id: a, engine: llamacpp, model: "file:x.gguf"}]\n')
    bad.write_text("pools: [{id: a, engine: llamacpp, model: x, slotz: 1}]\n")
    open_bind.write_text('daemon: {bind: "0.0.0.0:9200"}\n')
    code, out, _ = invoke("config", "check", str(good), "-o", "json")
    assert (code, json.loads(out)["pools"]) == (0, ["a"])
    code, _, err = invoke("config", "check", "--config", str(bad))
    assert "config check" not in err and "`pool-managerd config schema` prints every key\n" in err
    assert code == 1
    assert "slotz" in err
    code, out, _ = invoke("config", "check", str(open_bind), "-o", "json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert "without a token" in json.loads(out)["error"]
    code, out, _ = invoke("config", "schema")
    assert (code, json.loads(out)["type"]) == (0, "object")


def test_a_deep_check_tells_all_that_is_wrong_with_all_pools_at_once(
    invoke: Invoke, open_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(open_dir)
    (open_dir / "README.md").write_text("# a model\n")
    (open_dir / "c.yaml").write_text(
        f"""
profile: dev
pools:
  - {{id: flags, engine: llamacpp, model: "file:{tiny_model}", provisioning: {{mode: package,
     flags: [--ctx-siz, "4", --threds, "2", --api-key, x, --metrics, --frobnicate], env: {{LLAMA_ARG_PORT: "1", "": x}}}}}}
  - {{id: readme, engine: llamacpp, model: "file:README.md", provisioning: {{mode: package}}}}
  - {{id: gone, engine: llamacpp, model: "file:none.gguf", provisioning: {{mode: binary, binary: {{path: none}}}}}}
  - {{id: hub, engine: llamacpp, model: "hf:org/repo/m.gguf", provisioning: {{mode: package}}}}
  - {{id: fine, engine: llamacpp, model: "file:{tiny_model}", provisioning: {{mode: package}}}}
"""
    )
    code, out, _ = invoke("config", "check", "--deep", str(open_dir / "c.yaml"), "-o", "json")
    told = json.loads(out)
    assert (code, told["ok"]) == (1, False)
    flags = ("--ctx-siz", "did you mean '--ctx-size'", "--threds", "--api-key", "--frobnicate", "LLAMA_ARG_PORT", "''")
    words = (*flags, "begins with b'# a '", "there is no such file", "cannot run", "hf:org/repo/m.gguf")
    assert {(p["pool"], word) for p in told["problems"] for word in words if word in p["message"]} == {
        *(("flags", word) for word in flags), ("readme", "begins with b'# a '"), ("gone", "there is no such file"),
        ("gone", "cannot run"), ("hub", "hf:org/repo/m.gguf"),
    }  # fmt: skip
    hub = next(p["hint"] for p in told["problems"] if p["pool"] == "hub")
    assert "policy.allow_schemes" in hub and "policy.allow_network: true" in hub
    code, out, err = invoke("config", "check", str(open_dir / "c.yaml"))
    assert code == 0 and "warning: pool gone: cannot use the model" in err and "--deep" in err and "--ctx-siz" not in err


@pytest.mark.parametrize("deep", [[], ["--deep"]])
def test_a_port_that_two_pools_have_is_warned_of(
    invoke: Invoke, open_dir: Path, tiny_model: Path, deep: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(open_dir)
    pool = f'engine: llamacpp, model: "file:{tiny_model}", provisioning: {{mode: package, ports: [8081]}}'
    (open_dir / "c.yaml").write_text(f"profile: dev\npools: [{{id: chat, {pool}}}, {{id: code, {pool}}}]\n")
    code, out, err = invoke("config", "check", *deep, str(open_dir / "c.yaml"), "-o", "json")
    (told,) = json.loads(out)["warnings"]
    assert (code, told["code"]) == (0, "port_shared")
    assert f"warning: pools chat and code both have port 8081: {told['message'].partition(': ')[2]}" in err
    assert "ports: [8082]}  # pool code" in err


def test_the_daemons_own_port_as_a_pools_is_warned_of(
    invoke: Invoke, open_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(open_dir)
    pool = f'id: chat, engine: llamacpp, model: "file:{tiny_model}", provisioning: {{mode: package, ports: [9200]}}'
    (open_dir / "c.yaml").write_text(f"profile: dev\npools: [{{{pool}}}]\n")
    code, out, err = invoke("config", "check", str(open_dir / "c.yaml"), "-o", "json")
    assert (code, [told["code"] for told in json.loads(out)["warnings"]]) == (0, ["port_of_daemon"])
    assert "warning: pool chat has port 9200, which is the control API's" in err and "ports: [9201]}  # pool chat" in err


def test_the_configuration_in_effect_is_shown_without_its_secrets(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pool-managerd.yaml").write_text(
        """
daemon: {bind: "127.0.0.1:9333"}
pools:
  - {id: a, engine: llamacpp, model: "https://user:hunter2@example.org/m.gguf", provisioning: {env: {HF_TOKEN: hunter2, A: b},
     flags: [--api-key, hunter2, "--api-key=hunter2", --threads, "4"]}}
"""
    )
    monkeypatch.setenv("POOL_MANAGERD__HEALTH__INTERVAL_MS", "77")
    code, out, _ = invoke("config", "show")
    found = YAML(typ="safe", pure=True).load(out)
    assert (code, found["daemon"]["bind"], found["health"]["interval_ms"], found["profile"]) == (0, "127.0.0.1:9333", 77, "home")
    assert "hunter2" not in out
    assert found["pools"][0]["provisioning"]["flags"] == ["--api-key", "***", "--api-key=***", "--threads", "4"]
    assert json.loads(invoke("config", "show", "-o", "json")[1]) == found
    assert invoke("config", "show", "none.yaml")[0] == 2
    monkeypatch.chdir("/")
    assert YAML(typ="safe", pure=True).load(invoke("config", "show")[1])["health"]["interval_ms"] == 77


def test_version_is_what_health_says(invoke: Invoke) -> None:
    assert invoke("version")[1].strip() == "0.1.0"
    assert json.loads(invoke("version", "-o", "json")[1]) == {"version": "0.1.0"}


def test_every_command_has_help() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in (
        "serve",
        "demo",
        "pools",
        "status",
        "preload",
        "drain",
        "hold",
        "breaker",
        "config",
        "logs",
        "events",
        "--install-completion",
    ):
        assert name in result.output


HEAVY = ("aiohttp", "asyncio", "rich", "structlog", "prometheus_client", "pool_managerd.config.schema")


@pytest.mark.parametrize(
    "command",
    [
        "--help", "--version", "version", "pools", "pools -o json", "status", "events", "logs demo", "operations", "leases demo",
        "crashes", "explain demo", "explain --place", "devices", "command demo", "wait demo", "stop demo",
    ],
)  # fmt: skip
def test_a_command_that_asks_loads_nothing_heavy_and_finds_the_daemon_by_its_configuration(
    server: Server, tmp_path: Path, command: str
) -> None:
    server.node.log_file = tmp_path / "engine.log"
    server.node.log_file.write_text("line\n")
    bind = server.served.url.removeprefix("http://")
    (tmp_path / "pool-managerd.yaml").write_text(f'daemon: {{bind: "{bind}"}}\npools: [{{id: mistaken, engine: nope}}]\n')
    program = (
        "import sys\nfrom pool_managerd.cli.main import run\ntry: run()\nexcept SystemExit as end: code = end.code\n"
        f"print(code or 0, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    source = str(Path(__file__).resolve().parents[2] / "src")
    env = {name: value for name, value in os.environ.items() if not name.startswith("POOL_MANAGERD_")}
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split()], capture_output=True, text=True, timeout=30, cwd=tmp_path,
        env=env | {"PYTHONPATH": source}, check=True,
    )  # fmt: skip
    assert done.stderr == "0 []\n"
