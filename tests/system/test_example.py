"""The example program does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_the_embedding_example_runs(tiny_model: Path, engines_run: None) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    argv = [sys.executable, str(REPOSITORY / "examples/embed.py"), str(tiny_model)]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=50, env=env, check=False)
    assert ran.returncode == 0, ran.stderr
    own, clients = ran.stdout.split("clients use http://127.0.0.1:")
    assert own.count("Starting pool 'chat' on demand") == 1 and "ready at http://127.0.0.1:" in own and "answer: " in own
    assert clients.count("Starting pool 'chat' on demand") == 1 and "answer: " in clients
    assert "Pool 'chat' is down and holds nothing" in clients.rpartition("answer: ")[2]


def test_the_page_on_embedding_shows_the_example_as_it_is() -> None:
    page = (REPOSITORY / "docs/how-to/embed.md").read_text("utf-8")
    assert f"```python\n{(REPOSITORY / 'examples/embed.py').read_text('utf-8')}```\n" in page


def test_the_example_of_many_tasks_and_one_engine_runs(tiny_model: Path, engines_run: None) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    argv = [sys.executable, str(REPOSITORY / "examples/watch.py"), str(tiny_model)]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=50, env=env, check=False)
    assert ran.returncode == 0, ran.stderr
    done = [line for line in ran.stdout.splitlines() if line.startswith("task ")]
    assert len(done) == 5 and len({line.rpartition(" ")[2] for line in done}) == 1, ran.stdout
    assert ran.stdout.count("  spawn: ") == 1 and "  drain_started: " in ran.stdout
