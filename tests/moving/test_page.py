"""The page on moving over shows what the command does."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY
from tests.moving.moved import move

PAGE = (REPOSITORY / "docs/how-to/move-from-llama-swap.md").read_text("utf-8")


def test_the_example_becomes_what_the_page_says() -> None:
    (before,) = re.findall(r"^```yml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (after,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    moved = move(before)
    assert moved.text.replace("swap.yaml", "config.yaml") == after
    assert moved.dropped() == []
