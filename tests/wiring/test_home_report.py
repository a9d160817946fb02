"""Preflight before there is any configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool_managerd.core.gpu.devices import NOT_SCANNED
from pool_managerd.wiring.preflight import home_report


def test_a_machine_is_checked_from_a_directory_that_is_gone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert home_report(lambda: NOT_SCANNED, {}).profile == "home"
