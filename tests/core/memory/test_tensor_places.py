"""Which weights stay in RAM by the rules of a command line."""

from __future__ import annotations

import pytest

from pool_managerd.core.memory.tensor_places import (
    EXPERTS,
    MAX_PATTERN_CHARS,
    PlaceRule,
    bytes_in_ram,
    first_layers,
    layer_of,
    readable,
)

TENSORS = (
    ("blk.0.ffn_up_exps.weight", 100), ("blk.0.ffn_down_exps.weight", 50), ("blk.1.ffn_up_exps.weight", 30),
    ("blk.1.attn_q.weight", 7), ("output.weight", 5),
)  # fmt: skip


def test_the_first_rule_that_matches_a_tensor_decides() -> None:
    assert bytes_in_ram(TENSORS, (PlaceRule(EXPERTS),)) == {0: 150, 1: 30}
    assert bytes_in_ram(TENSORS, (PlaceRule(r"blk\.0\.", in_ram=False), PlaceRule(EXPERTS))) == {1: 30}
    assert bytes_in_ram(TENSORS, (PlaceRule("output"),)) == {None: 5}
    assert bytes_in_ram(TENSORS, ()) == {}


def test_the_first_layers_experts_are_one_rule() -> None:
    assert first_layers(0) == ()
    assert bytes_in_ram(TENSORS, first_layers(1)) == {0: 150}
    assert bytes_in_ram(TENSORS, first_layers(2)) == {0: 150, 1: 30}
    assert len(first_layers(10**9)[0].pattern) < 5_000


@pytest.mark.parametrize(
    ("pattern", "applied"),
    [("ffn_.*_exps", True), ("a*b+", True), ("a*b*c*", False), ("(ab)+", False), ("(?=a)", False), (r"(a)\1", False),
     ("[", False), ("x" * MAX_PATTERN_CHARS, True), ("x" * (MAX_PATTERN_CHARS + 1), False)],
)  # fmt: skip
def test_only_patterns_that_take_little_time_are_applied(pattern: str, applied: bool) -> None:
    assert readable(pattern) is applied


def test_a_tensors_layer_is_in_the_beginning_of_its_name() -> None:
    assert (layer_of("blk.12.attn"), layer_of("output"), layer_of("v.blk.3.x")) == (12, None, None)
