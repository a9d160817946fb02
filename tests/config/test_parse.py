"""YAML and TOML as plain values with places; nothing but plain data, nothing unbounded."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.config.parse import MAX_FILE_BYTES, parse_scalar, parse_toml, parse_yaml, read_bounded


def test_keys_and_values_know_where_they_were_written() -> None:
    tree = parse_yaml("a: 1\nb:\n  - {c: 2}\n  - d\n", "f")
    assert tree.values == {"a": 1, "b": [{"c": 2}, "d"]}
    assert tree.places == {
        (): "f:1:1",
        ("a",): "f:1:1",
        ("b",): "f:2:1",
        ("b", 0): "f:3:5",
        ("b", 0, "c"): "f:3:6",
        ("b", 1): "f:4:5",
    }


def test_yaml_is_version_1_2() -> None:
    tree = parse_yaml("a: [yes, on, 0o17, 010, 0x1F, 1e3, ~, 2026-01-01, 1:30]\n", "f")
    assert tree.values == {"a": ["yes", "on", 15, 10, 31, 1000.0, None, "2026-01-01", "1:30"]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2\n", "f:2:1: a: duplicate key 'a': it is already set at f:1:1"),
        ("a: !!python/object:os.system x", "f:1:4: a: cannot use the tag tag:yaml.org,2002:python/object:os.system: only plain values are read"),  # noqa: E501
        ("a: !secret x", "f:1:4: a: cannot use the tag !secret: only plain values are read"),
        ("a: .inf", "f:1:4: a: cannot use '.inf': must be a finite number"),
        ("a: .nan", "f:1:4: a: cannot use '.nan': must be a finite number"),
        ("? [a]\n: 1", "f:1:3: cannot use a key that is not text"),
        ("- a", "f:1:1: cannot use it: the top must be a mapping of sections"),
        ("a: [1\nb: 2", "f:2:2: cannot read it as YAML: expected ',' or ']', but got ':'"),
        ("a: &x [*x]", "f: cannot read it as YAML: nested deeper than 32"),
        ("a: *nobody", "f:1:4: cannot read it as YAML: found undefined alias 'nobody'"),
        ("a: 1\n---\nb: 2", "f:2:1: cannot read it as YAML: but found another document"),
    ],
)  # fmt: skip
def test_what_is_not_plain_data_is_refused_with_its_place(text: str, problem: str) -> None:
    assert [str(found) for found in parse_yaml(text, "f").problems] == [problem]


SHARED = """\
x-base: &base
  engine: llamacpp
  ctx: 4096
x-more: &more {<<: *base, slots: 2, ctx: 8192}
pools:
  - <<: *base
    id: a
  - id: b
    <<: *more
    slots: 3
  - {<<: [*more, *base], id: c}
"""


def test_keys_are_taken_over_from_anchors_and_give_way_to_a_pools_own() -> None:
    tree = parse_yaml(SHARED, "f")
    assert tree.problems == []
    assert tree.values == {"pools": [
        {"engine": "llamacpp", "ctx": 4096, "id": "a"},
        {"engine": "llamacpp", "ctx": 8192, "slots": 3, "id": "b"},
        {"engine": "llamacpp", "ctx": 8192, "slots": 2, "id": "c"},
    ]}  # fmt: skip
    assert tree.places[("pools", 0, "ctx")] == "f:3:3", "an error is where the value was written"
    assert tree.places[("pools", 1, "slots")] == "f:10:5"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: {<<: 4}", "f:1:9: a: cannot merge it: `<<` takes a mapping, as `<<: *anchor`, or a list of them"),
        ("a: {<<: [{b: 1}, c]}", "f:1:18: a: cannot merge it: `<<` takes a mapping, as `<<: *anchor`, or a list of them"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "f:1:17: a.<<: duplicate key '<<': it is already set at f:1:5"),
        ("a: &a {<<: *a}", "f: cannot read it as YAML: too many values (aliases expanded)"),
        ("x-a: !secret b", "f:1:6: x-a: cannot use the tag !secret: only plain values are read"),
    ],
)
def test_what_cannot_be_merged_is_said_with_its_place(text: str, problem: str) -> None:
    assert [str(found) for found in parse_yaml(text, "f").problems] == [problem]


def test_a_merge_bomb_is_refused_quickly() -> None:
    bomb = "x-a: &a {k: 1}\n" + "".join(
        f"x-{name}: &{name} {{<<: [{','.join([f'*{before}'] * 10)}]}}\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    wide = "x-w: &w {" + ",".join(f"k{number}: 1" for number in range(5_000)) + "}\n"
    wide += "".join(f"x-{number}: {{<<: *w}}\n" for number in range(5_000))
    for text in (bomb, wide):
        began = time.process_time()
        assert "too many values" in str(parse_yaml(text, "f").problems[0])
        assert time.process_time() - began < 5


def test_a_quoted_double_arrow_is_a_key_like_any_other() -> None:
    assert parse_yaml('a: {"<<": {b: 1}}', "f").values == {"a": {"<<": {"b": 1}}}


def test_an_alias_bomb_is_refused_quickly() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    began = time.monotonic()
    assert "too many values" in str(parse_yaml(bomb, "f").problems[0])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 20_000])
def test_absurd_nesting_is_refused(text: str) -> None:
    assert parse_yaml(text, "f").problems


def test_absurd_nesting_in_toml_is_refused() -> None:
    assert parse_toml(f"a = {'[' * 100_000}", "f").problems


def test_a_file_beyond_the_limit_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("big") / "big.yaml"
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ValueError, match="larger than"):
        read_bounded(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("true", True), ("[1, a]", [1, "a"]), ('{"a": 1}', {"a": 1}), ("8080-8999", "8080-8999"), ("x: y", "x: y"),
     ("127.0.0.1:1", "127.0.0.1:1"), ("", None), ("[1", "[1"), ("inf", "inf"), (".inf", ".inf")],
)  # fmt: skip
def test_one_string_becomes_the_value_that_it_looks_like(text: str, value: object) -> None:
    assert parse_scalar(text) == value


# JSON writes characters beyond the basic plane as surrogate pairs, which YAML does not know.
_text = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=8)
_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_text, _plain, max_size=4))
def test_json_reads_as_yaml_with_the_same_values(values: dict[str, object]) -> None:
    tree = parse_yaml(json.dumps(values), "f")
    assert tree.problems == []
    assert _close(tree.values, values)


@given(st.text(max_size=60))
def test_no_text_makes_the_readers_fall_over(text: str) -> None:
    for parse in (parse_yaml, parse_toml):
        tree = parse(text, "f")
        assert isinstance(tree.values, dict)


def _close(left: object, right: object) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_close(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_close(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(right, float) and isinstance(left, float | int):
        return math.isclose(left, right, rel_tol=1e-12)
    return left == right
