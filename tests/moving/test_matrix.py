"""The matrix' expressions, written out."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.moving.matrix import MAX_SETS, Node, TooManyError, expanded, parse

NAMES = "abcde"


def sets(text: str, **others: str) -> list[set[str]]:
    return [set(one) for _, one in expanded({**others, "it": text}, lambda name: name if name in NAMES else None)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a", [{"a"}]),
        ("a & b", [{"a", "b"}]),
        ("a | b", [{"a"}, {"b"}]),
        ("(a | b) & c", [{"a", "c"}, {"b", "c"}]),
        ("(a|b)&(c|d)", [{"a", "c"}, {"a", "d"}, {"b", "c"}, {"b", "d"}]),
        ("a & b | c", [{"a", "b"}, {"c"}]),
        ("a | b & c", [{"a"}, {"b", "c"}]),
        ("((a))", [{"a"}]),
        ("a & a | a", [{"a"}]),
    ],
)
def test_an_expression_is_written_out_in_its_order(text: str, found: list[set[str]]) -> None:
    assert sets(text) == found


def test_what_a_set_refers_to_comes_before_it() -> None:
    found = expanded({"big": "+small & c", "small": "a | b"}, lambda name: name)
    assert [(name, "".join(sorted(one))) for name, one in found] == [
        ("small", "a"), ("small", "b"), ("big", "ac"), ("big", "bc"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the expression is empty"),
        ("a &", "ends where a name should be"),
        ("& a", "'&' at sign 1 is not expected"),
        ("a b", "'b' at sign 3 is not expected"),
        ("(a | b", "the ( at sign 1 is not closed"),
        ("a)", "')' at sign 2 is not expected"),
        ("a + b", "the + at sign 3 has no name"),
        ("a ! b", "'!' at sign 3 is neither"),
        ("+nothing", "there is no set 'nothing'"),
        ("x", "no model or var 'x'"),
        ("+it", "refers to itself"),
        ("(" * 60 + "a" + ")" * 60, "nested deeper than 50"),
        ("a" + " & a" * 9_999, "more than 10000"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^set 'it': ") as caught:
        sets(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        " & ".join(f"(m{i} | n{i})" for i in range(40)),
        " & ".join(["(" + " | ".join(f"m{i}" for i in range(300)) + ")"] * 15),
        " | ".join(f"m{i}" for i in range(MAX_SETS + 1)),
    ],
)
def test_what_stands_for_too_many_sets_ends_soon(text: str) -> None:
    with pytest.raises(TooManyError):
        expanded({"it": text}, lambda name: name)


def test_sets_that_double_each_other_end_soon() -> None:
    doubled = {"s0": "m0 | n0"} | {f"s{i}": f"+s{i - 1} & (m{i} | n{i})" for i in range(1, 45)}
    with pytest.raises(TooManyError):
        expanded(doubled, lambda name: name)


def test_references_as_deep_as_a_chain_are_refused() -> None:
    chain = {f"s{i}": f"+s{i + 1}" for i in range(200)} | {"s200": "a"}
    with pytest.raises(ValueError, match="too deeply"):
        expanded(chain, lambda name: name)


trees = st.recursive(
    st.sampled_from(NAMES).map(lambda name: Node("name", name)),
    lambda inner: st.builds(
        lambda kind, parts: Node(kind, parts=tuple(parts)),
        st.sampled_from(["and", "or"]),
        st.lists(inner, min_size=2, max_size=3),
    ),
    max_leaves=8,
)


def written(node: Node) -> str:
    if node.kind == "name":
        return node.name
    return "(" + (" & " if node.kind == "and" else "|").join(map(written, node.parts)) + ")"


def choices(node: Node) -> list[Node]:
    own = [node] if node.kind == "or" else []
    return own + [found for part in node.parts for found in choices(part)]


def taken(node: Node, way: dict[int, int]) -> set[str]:
    """The models of one way to decide every ``or``."""
    if node.kind == "name":
        return {node.name}
    parts = node.parts if node.kind == "and" else (node.parts[way[id(node)]],)
    return set().union(*(taken(part, way) for part in parts))


@given(trees)
def test_the_sets_are_those_of_every_way_to_decide(tree: Node) -> None:
    ors = choices(tree)
    ways = product(*(range(len(one.parts)) for one in ors))
    brute = {frozenset(taken(tree, {id(one): at for one, at in zip(ors, way, strict=True)})) for way in ways}
    found = [frozenset(one) for one in sets(written(tree))]
    assert set(found) == brute and len(found) == len(brute)


@given(st.text(alphabet="ab&|()+ .", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        assert str(error)
