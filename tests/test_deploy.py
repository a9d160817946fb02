"""What deploy/ has is what the documentation shows, and what systemd accepts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

UNIT = REPOSITORY / "deploy/systemd/pool-managerd.service"


def test_the_documentation_shows_the_unit_that_there_is() -> None:
    page = (REPOSITORY / "docs/how-to/run-as-a-service.md").read_text("utf-8")
    (shown,) = re.findall(r"```ini\n(.*?)```", page, re.S)
    assert shown == UNIT.read_text("utf-8")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        pytest.skip("there is no systemd-analyze here")
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text("utf-8")))
    found = subprocess.run([analyse, "verify", str(copy)], capture_output=True, text=True, timeout=60, check=False)
    if "Failed to" in found.stderr and "unit" not in found.stderr.lower():
        pytest.skip(f"systemd-analyze does not run here: {found.stderr.strip()}")
    assert found.returncode == 0 and UNIT.name not in found.stderr, found.stderr


@pytest.mark.parametrize(
    "line",
    ["Delegate=yes", "OOMPolicy=continue", "KillMode=process", "LimitMEMLOCK=infinity", "ExecReload=/bin/kill -HUP $MAINPID"],
)
def test_what_adoption_needs_is_in_the_unit(line: str) -> None:
    assert line in UNIT.read_text("utf-8").splitlines()
