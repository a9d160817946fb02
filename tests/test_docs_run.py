"""What the documentation tells people to type runs as printed: the tutorial whole, every other command as far as its words go."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from pool_managerd.cli.main import app
from pool_managerd.config.load import load_config
from pool_managerd.telemetry import series
from tests.conftest import REPOSITORY, free_port, http_status, wait_until
from tests.tiny_model import write_tiny_model

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROMETHEUS = re.compile(r"(scrape_configs|groups):")
_HAND_WRITTEN = [
    path
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    if "decisions" not in path.parts and path.name not in {"cli.md", "config.md", "lifecycle.md", "api.md", "metrics.md"}
]


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in _BLOCK.findall(page.read_text("utf-8")) if language in languages]


def commands(text: str) -> Iterator[str]:
    """What stands behind ``$``, with its continuation lines; the rest of a block is what it prints."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\") or not _whole(command):
                command = f"{command}\n{next(lines)}"
            yield command


def every(*languages: str) -> list[object]:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in _HAND_WRITTEN
        for number, text in enumerate(blocks(page, *languages), 1)
    ]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _whole(command: str) -> bool:
    """Whether its quotes are closed."""
    try:
        _words(command)
    except ValueError:
        return False
    return True


def _words(command: str) -> list[str]:
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def words_of(command: str) -> list[str]:
    """The arguments of the ``pool-managerd`` that a line begins with, empty when it begins with something else."""
    words = _words(command)
    if not words or Path(words[0]).name != "pool-managerd":
        return []
    return words[1 : next((i for i, word in enumerate(words) if word in {"|", ">", "&", "&&", ";"}), None)]


def spoken(words: list[str]) -> None:
    """Parse ``words`` as the command line would, down to the last subcommand, and run nothing."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("pool-managerd", list(words))
    while rest := [*getattr(context, "_protected_args", ()), *context.args]:
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "commands"):
            return


@pytest.mark.parametrize("text", every("console", "bash"))
def test_every_command_is_one_that_the_command_line_knows(text: str) -> None:
    for command in commands(text):
        words = words_of(command)
        if words and "ID" not in words and "…" not in command:
            spoken(words)


@pytest.mark.parametrize("text", every("yaml"))
def test_every_configuration_is_accepted(text: str, tmp_path: Path) -> None:
    if _PROMETHEUS.match(text):
        assert YAML(typ="safe").load(text)
        return
    whole = text if re.search(r"^\w+:", text, re.MULTILINE) else f"pools:\n{text}"
    (tmp_path / "c.yaml").write_text(whole)
    assert YAML(typ="safe").load(whole)
    load_config(tmp_path / "c.yaml", env={})


def test_every_alert_asks_for_a_metric_that_is_served() -> None:
    page = REPOSITORY / "docs/how-to/observe.md"
    rules = [text for text in blocks(page, "yaml") if _PROMETHEUS.match(text) and "expr:" in text]
    asked = {name for text in rules for line in re.findall(r"expr: (.*)", text) for name in re.findall(r"[a-z]\w*_\w+", line)}
    assert asked and asked <= {found.name for found in series.ALL}


def test_the_readme_program_runs(open_dir: Path) -> None:
    readme = REPOSITORY / "README.md"
    write_tiny_model(_made(open_dir / "models") / "chat.gguf")
    (open_dir / "pool-managerd.yaml").write_text(blocks(readme, "yaml")[0])
    (open_dir / "program.py").write_text(blocks(readme, "python")[0])
    ran = subprocess.run([sys.executable, "program.py"], cwd=open_dir, capture_output=True, text=True, timeout=50, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("text", every("json"))
def test_every_json_document_is_one(text: str) -> None:
    TypeAdapter(object).validate_json(text)


@pytest.mark.parametrize("text", every("ini"))
def test_every_unit_has_the_sections_of_a_service(text: str) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read_string(text.replace("\\\n", " "))
    assert {"Unit", "Service", "Install"} <= set(unit.sections())
    spoken(shlex.split(unit["Service"]["ExecStart"])[1:])


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("first-pool.md", ["Paris", "SIGKILL", "127.0.0.1"]),
        (
            "models-in-your-editor.md",
            ['"unloaded"', "Paris", "A request for pool 'code' would start it", "REQUEST", "pools ready"],
        ),
    ],
)
@pytest.mark.timeout(240)
def test_a_tutorial_runs_as_printed(open_dir: Path, smol_model: Path, page: str, said: list[str]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the tutorial talks to the engine with curl, which is not there")
    found, gateway = REPOSITORY / "docs/tutorial" / page, str(free_port())
    typed = [command for text in blocks(found, "console") for command in commands(text) if command != "make setup"]
    typed = [command.replace(":8088", f":{gateway}") for command in typed]
    (open_dir / "pool-managerd.yaml").write_text(blocks(found, "yaml")[0].replace(":8088", f":{gateway}"))
    venv = open_dir / ".venv"
    (venv / "lib/python3").mkdir(parents=True)
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / "lib/python3/site-packages").symlink_to(smol_model.parent.parent)
    address = f"127.0.0.1:{free_port()}"
    env = {**os.environ, "POOL_MANAGERD_ADDR": address, "NO_COLOR": "1"}

    served = typed.index("pool-managerd serve --config pool-managerd.yaml")
    exports = [command for command in typed if command.startswith("export ")]
    bash(typed[:served], open_dir, env)
    daemon = subprocess.Popen(
        ["/bin/bash", "-c", "\n".join([*exports, f"exec {typed[served]}"])], cwd=open_dir, env=env, stdin=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: http_status(f"http://{address}/health") == 200, "the daemon to answer")
        printed = bash([*exports, *typed[served + 1 :]], open_dir, env)
        assert [text for text in said if text not in printed] == [], printed
    finally:
        daemon.send_signal(signal.SIGINT)  # Ctrl-C
        assert daemon.wait(20) == 0
    assert not list((open_dir / ".runtime").glob("*.pid"))


def bash(typed: list[str], folder: Path, env: dict[str, str]) -> str:
    """What the lines print, one after the other; the first one that fails ends the test."""
    # status answers "is it ready?" by its exit code, too: 1 is no failure of the page
    lines = [f"{line} || [ $? = 1 ]" if line.startswith("pool-managerd status") else line for line in typed]
    script = "set -e -o pipefail\n" + "\n".join(lines)
    ran = subprocess.run(
        ["/bin/bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
