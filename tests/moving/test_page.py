"""The pages on moving over show what the commands do."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.conftest import REPOSITORY
from tests.moving.moved import Result, move, move_presets

PAGES: list[tuple[str, str, Callable[[str], Result], str]] = [
    ("move-from-llama-swap.md", "yml", move, "config.yaml"),
    ("move-from-llama-cpp-router.md", "cfg", move_presets, "presets.ini"),
]


@pytest.mark.parametrize(("page", "language", "moved_by", "name"), PAGES, ids=[row[0] for row in PAGES])
def test_the_example_becomes_what_the_page_says(page: str, language: str, moved_by: Callable[[str], Result], name: str) -> None:
    text = (REPOSITORY / "docs/how-to" / page).read_text("utf-8")
    (before,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (after,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    moved = moved_by(before)
    assert moved.text.replace("swap.yaml", name) == after
    assert moved.dropped() == []
