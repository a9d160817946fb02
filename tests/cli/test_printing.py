"""Output that nobody reads, or that cannot be written: real processes, since only they have real pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_commands import Server
from tests.conftest import wait_until

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
COMMAND = f"'{sys.executable}' -m pool_managerd.cli"


@pytest.fixture(autouse=True)
def _engine_log(server: Server, tmp_path: Path) -> None:
    server.node.log_file = tmp_path / "engine.log"
    server.node.log_file.write_text("first line\n")


READS = (
    "pools", "pools -o json", "status demo", "status -o json", "events", "events -o json", "logs demo", "logs demo -o json",
    "crashes -o json", "leases demo", "explain demo", "devices", "devices -o json", "operations", "command demo", "version",
    "top", "top -o json", "--help", "--version", "config schema", "config show", "start --help",
)  # fmt: skip


def shell(server: Server, text: str) -> tuple[int, str]:
    env = os.environ | {"PYTHONPATH": SOURCE, "POOL_MANAGERD_URL": server.served.url}
    done = subprocess.run(
        ["/bin/bash", "-c", text], env=env, capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", READS)
def test_a_full_disk_is_said_and_is_a_1(server: Server, command: str) -> None:
    server.soon(lambda: server.node.events.publish("crash", "demo"))
    code, err = shell(server, f"{COMMAND} {command} >/dev/full")
    assert (code, err) == (1, "cannot write the output: No space left on device\n")


@pytest.mark.parametrize("command", READS)
def test_a_reader_that_goes_away_ends_the_command_quietly(server: Server, command: str) -> None:
    """The pipe is closed before the first byte, which is what ``| head -0`` and a quick ``| grep -q`` do."""
    server.soon(lambda: server.node.events.publish("crash", "demo"))
    code, err = shell(server, f"{{ {COMMAND} {command}; echo $? >&2; }} | true")
    assert (code, err.split()) == (0, ["141"])


@pytest.mark.parametrize("output", ["", "-o json"])
def test_following_ends_quietly_when_the_reader_has_seen_enough(server: Server, output: str) -> None:
    server.soon(lambda: [server.node.events.publish("crash", "demo") for _ in range(2_500)])
    code, err = shell(server, f"{{ {COMMAND} events --since 9999d {output}; echo $? >&2; }} | head -1 >/dev/null")
    assert (code, err.split()) == (0, ["141"])


@pytest.mark.parametrize("command", ["preflight -o table", "preflight", "config check good.yaml", "--show-completion bash"])
def test_so_it_is_for_commands_that_ask_no_daemon(server: Server, tmp_path: Path, command: str) -> None:
    (tmp_path / "good.yaml").write_text("profile: dev\n")
    code, err = shell(server, f"cd {tmp_path}; {COMMAND} {command} >/dev/full")
    assert (code, err) == (1, "cannot write the output: No space left on device\n")
    assert shell(server, f"cd {tmp_path}; {{ {COMMAND} {command}; echo $? >&2; }} | true") == (0, "141\n")


def test_an_error_that_cannot_be_told_keeps_its_exit_code(server: Server) -> None:
    assert shell(server, f"{COMMAND} status nope 2>/dev/full")[0] == 4
    assert shell(server, f"{COMMAND} pools --url http://127.0.0.1:1 2>/dev/full")[0] == 3


@pytest.mark.parametrize("command", [["events", "-f"], ["logs", "demo", "-f"], ["logs", "demo", "-f", "-o", "json"]])
def test_ctrl_c_ends_what_follows_with_130_and_no_traceback(server: Server, command: list[str]) -> None:
    server.soon(lambda: server.node.events.publish("crash", "demo"))
    env = os.environ | {"PYTHONPATH": SOURCE, "POOL_MANAGERD_URL": server.served.url}
    with subprocess.Popen(
        [sys.executable, "-m", "pool_managerd.cli", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a shell's background job ignores it
    ) as running:  # fmt: skip
        assert running.stdout is not None and running.stderr is not None
        line = running.stdout.readline()
        assert line and (command[-1] != "json" or json.loads(line)["pool_id"] == "demo")
        running.send_signal(signal.SIGINT)
        wait_until(lambda: running.poll() is not None, "the command to end")
        assert (running.returncode, running.stderr.read()) == (130, "")
