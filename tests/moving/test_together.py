"""Groups and matrices as ``together``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool_managerd.errors import SpecError
from tests.moving.moved import Result, move


def moved(names: str, **keys: Any) -> Result:
    models = {name: {"cmd": "docker run -p ${PORT}:1 x" if name.isupper() else f"llama-server -m /{name}"} for name in names}
    return move(json.dumps({"models": models, **keys}))


def groups(found: Result) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = found.values.get("together", {}).get("groups", [])
    return listed


def test_models_of_no_group_take_turns() -> None:
    assert groups(moved("ab")) == [{"id": "default", "pools": ["a", "b"]}]
    assert "together" not in moved("a").values
    assert "without this group" in moved("ab").text


@pytest.mark.parametrize("nested", [False, True])
def test_a_group_keeps_its_meaning_wherever_it_stands(nested: bool) -> None:
    given = {"g": {"members": ["a", "b"]}, "h": {"swap": False, "exclusive": False, "persistent": True, "members": ["c"]}}
    found = moved("abcd", **({"routing": {"router": {"settings": {"groups": given}}}} if nested else {"groups": given}))
    assert groups(found) == [
        {"id": "g", "pools": ["a", "b"], "exclusive": True},
        {"id": "h", "pools": ["c"], "swap": False, "persistent": True},
        {"id": "default", "pools": ["d"], "exclusive": True},
    ]
    assert found.dropped() == []


def test_members_that_are_no_pools_are_told() -> None:
    found = moved("aBC", groups={"g": {"members": ["a", "B", "z"]}, "e": {"members": ["C"]}})
    assert groups(found) == [{"id": "g", "pools": ["a"], "exclusive": True}]
    assert set(found.dropped()) >= {"groups.g.members[1]", "groups.g.members[2]", "groups.e", "groups.e.members[0]"}


MATRIX = {"vars": {"x": "a"}, "evict_costs": {"x": 50, "b": 5_000}, "sets": {"one": "x & c", "two": "(b | +one) & d"}}


@pytest.mark.parametrize("keys", [{"matrix": MATRIX}, {"routing": {"router": {"use": "matrix", "settings": {"matrix": MATRIX}}}}])
def test_a_matrix_is_written_out(keys: dict[str, Any]) -> None:
    found = moved("abcd", **keys)
    assert found.values["together"] == {"sets": [["a", "c"], ["b", "d"], ["a", "c", "d"]]}
    assert [pool.eviction_weight for pool in found.config.pools] == [50, 1_000, 1, 1]
    assert found.dropped() == [] and "# two" in found.text


def test_a_matrix_of_too_many_sets_is_dropped_and_memory_decides() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    sets = " & ".join(f"({one} | {other})" for one, other in zip(letters[:13], letters[13:], strict=True))
    found = moved(letters, matrix={"sets": {"all": sets}})
    assert found.dropped() == ["matrix.sets"] and "together" not in found.values


def test_of_two_preloaded_pools_that_are_kept_apart_the_first_stays() -> None:
    hooks = {"on_startup": {"preload": ["b", "a", "c"]}}
    found = moved("abc", hooks=hooks, groups={"g": {"swap": False, "members": ["b", "c"]}})
    assert [pool.preload for pool in found.config.pools] == [False, True, True]
    assert found.dropped() == ["hooks.on_startup.preload[1]"]
    found = moved("abc", hooks=hooks, matrix={"sets": {"s": "b & c | a"}})
    assert [pool.preload for pool in found.config.pools] == [False, True, True]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"groups": {"g": {"members": ["a"]}}, "routing": {"router": {"use": "group"}}}, "llama-swap takes one of both places"),
        ({"groups": {"g": {"members": ["a"]}}, "matrix": {"sets": {"s": "a"}}}, "llama-swap takes one of both"),
        ({"routing": {"router": {"use": "odd"}}}, "it must be group or matrix"),
        ({"routing": {"router": {"use": "matrix"}}}, "there is none in settings"),
        ({"groups": {"g": {"members": ["a", "a"]}}}, "cannot use 'a' again"),
        ({"groups": {"g": {"members": ["a"]}, "h": {"members": ["a"]}}}, "it is in group 'g' already"),
        ({"groups": {"g": {"swap": 3, "members": ["a"]}}}, "groups.g.swap: cannot use 3"),
        ({"matrix": {"vars": {"x": "z"}, "sets": {"s": "a"}}}, "matrix.vars.x: cannot use 'z': there is no such model"),
        ({"matrix": {"vars": {"x": "a"}}}, "cannot use a matrix without sets"),
        ({"matrix": {"sets": {"s": "a &"}}}, "matrix.sets: cannot read set 's'"),
        ({"matrix": {"sets": {"s": "a"}, "evict_costs": {"a": 0}}}, "matrix.evict_costs.a: cannot use it: it must be 1 or more"),
        ({"matrix": {"sets": {"s": "a"}, "evict_costs": {"z": 1}}}, "there is no such model or var"),
    ],
)
def test_rules_that_llama_swap_would_not_take_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        moved("ab", **keys)
    assert said in caught.value.message


LETTERS = "abcde"


@st.composite
def grouped(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Groups of some of the models; the rest is in none."""
    found: dict[str, dict[str, Any]] = {}
    for letter in LETTERS:
        if (name := draw(st.sampled_from(["g", "h", ""]))) != "":
            found.setdefault(name, {"members": []})["members"].append(letter)
    for group in found.values():
        group |= {key: draw(st.booleans()) for key in ("swap", "exclusive", "persistent") if draw(st.booleans())}
    return found


@settings(max_examples=60, deadline=None)
@given(grouped(), st.sampled_from(LETTERS), st.sets(st.sampled_from(LETTERS)))
def test_groups_make_the_same_models_go_as_in_llama_swap(given_groups: dict[str, Any], asked: str, loaded: set[str]) -> None:
    rules = moved(LETTERS, groups=given_groups).config.together.rules
    whole = {name: {"swap": True, "exclusive": True, "persistent": False} | group for name, group in given_groups.items()}
    rest = [letter for letter in LETTERS if not any(letter in group["members"] for group in whole.values())]
    whole["(default)"] = {"swap": True, "exclusive": True, "persistent": False, "members": rest}
    own = next(group for group in whole.values() if asked in group["members"])
    gone = {one for one in own["members"] if own["swap"] and one != asked}
    if own["exclusive"]:
        gone |= {one for group in whole.values() if group is not own and not group["persistent"] for one in group["members"]}
    assert rules.ways(asked, loaded) == (frozenset(gone & (loaded - {asked})),)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.sampled_from(LETTERS), min_size=1), min_size=1, max_size=4), st.sampled_from(LETTERS), st.data())
def test_sets_make_as_little_go_as_in_llama_swap(sets: list[set[str]], asked: str, data: st.DataObject) -> None:
    costs = {letter: data.draw(st.integers(1, 9)) for letter in LETTERS}
    loaded = data.draw(st.sets(st.sampled_from(LETTERS.replace(asked, ""))))
    expressions = {f"s{number}": " & ".join(sorted(one)) for number, one in enumerate(sets)}
    config = moved(LETTERS, matrix={"sets": expressions, "evict_costs": costs}).config
    assert {pool.id: pool.eviction_weight for pool in config.pools} == costs
    least = min(
        (sum(costs[one] for one in loaded - found) for found in sets if asked in found),
        default=sum(map(costs.__getitem__, loaded)),
    )
    ours = min(sum(costs[one] for one in way) for way in config.together.rules.ways(asked, loaded))
    assert ours == least
