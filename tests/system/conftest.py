"""What takes long and tells little more than its neighbours is left to ``make faults``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.conftest import ALL


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that are marked slow run where all are asked for, or where they are named."""
    if os.environ.get(ALL) == "all" or config.getoption("-k") or config.getoption("-m"):
        return
    folders = [Path(__file__).parent, Path(__file__).parent.parent / "gpu"]
    late = [item for item in items if item.path.parent in folders and item.get_closest_marker("slow")]
    if late:
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in set(late)]
