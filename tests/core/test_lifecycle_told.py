"""The whole of what happens to a pool and what is said of it, story by story, word for word (see told.py)."""

from __future__ import annotations

import pytest

from tests.core.told import FOLDER, STORIES, told


@pytest.mark.parametrize("name", STORIES)
def test_a_story_is_told_as_it_was(name: str) -> None:
    assert told(name) == (FOLDER / f"{name}.txt").read_text(), "see python -m tests.core.told"
