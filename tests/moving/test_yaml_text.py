"""YAML for people that reads back as what was written."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.config.parse import KeyPath, parse_yaml
from pool_managerd.moving.yaml_text import WIDTH, comment, dump

texts = st.text(max_size=12) | st.sampled_from(
    ["no", "1", "-1", "0x1", ".5", "1e3", "null", "~", "- a", "a: b", "a #b", "--x", "on", ""]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e6, 1e6) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(texts.filter(lambda key: not key.startswith("x-")), values, max_size=4), st.text(max_size=30))
def test_whatever_is_written_reads_back_as_it_was(found: dict[str, Any], note: str) -> None:
    notes: dict[KeyPath, list[str]] = {(key,): [note] for key in found}
    notes[()] = [note]
    tree = parse_yaml("start: 1\n" + dump(found, notes), "")
    assert tree.problems == [] and {"start": 1, **found} == tree.values


@given(st.text(max_size=300))
def test_a_comment_is_a_comment_in_every_line(text: str) -> None:
    lines = list(comment([text], "  "))
    assert all(line.startswith("  #") and len(line) <= WIDTH + 2 and line.isprintable() for line in lines)


def test_long_lists_are_broken_between_their_items() -> None:
    text = dump({"flags": [f"--flag-number-{i}" for i in range(12)]}, {})
    assert max(map(len, text.splitlines())) <= WIDTH and text.splitlines()[0] == "flags: ["


def test_what_is_long_is_cut_with_a_mark() -> None:
    assert list(comment(["x\n" * 100], ""))[-1] == "# …"
    assert "".join(comment(["y" * 5_000], "")).endswith("…")
