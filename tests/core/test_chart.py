"""The page about the lifecycle is that of the code."""

from __future__ import annotations

from pathlib import Path

from tests.core.chart import markdown


def test_the_page_about_the_lifecycle_is_current() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/reference/lifecycle.md"
    assert page.read_text("utf-8") == markdown(), "run: python -m tests.core.chart > docs/reference/lifecycle.md"
