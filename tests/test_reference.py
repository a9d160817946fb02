"""The generated reference pages are those of the code as it is."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest

import pool_managerd

REFERENCE = Path(__file__).resolve().parents[1] / "docs/reference"


def _pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("regenerate", REFERENCE / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[str, str] = module.pages()
    return pages


def test_every_public_name_and_method_of_the_library_says_what_it_does() -> None:
    for name in pool_managerd.__all__:
        thing = getattr(pool_managerd, name)
        if name != "__version__":
            assert (thing.__doc__ or "").strip() and not thing.__doc__.startswith(f"{name}("), name
        for attribute, member in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert member.__doc__, f"{name}.{attribute} says nothing"


@pytest.mark.parametrize(
    "name", ["api.md", "cli.md", "config.md", "config.schema.json", "crashes.md", "library.md", "metrics.md", "openapi.json"]
)
def test_a_reference_page_is_current(name: str) -> None:
    hint = "it is out of date: run python docs/reference/regenerate.py"
    assert (REFERENCE / name).read_text(encoding="utf-8") == _pages()[name], hint
