"""The generated reference pages are those of the code as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parents[1] / "docs/reference"


def _pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("regenerate", REFERENCE / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[str, str] = module.pages()
    return pages


@pytest.mark.parametrize("name", ["api.md", "cli.md", "config.md", "config.schema.json", "metrics.md", "openapi.json"])
def test_a_reference_page_is_current(name: str) -> None:
    hint = "it is out of date: run python docs/reference/regenerate.py"
    assert (REFERENCE / name).read_text(encoding="utf-8") == _pages()[name], hint
