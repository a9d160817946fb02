"""Which GPUs a pool without a mask gets."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.groups import best_first
from tests.core.gpus import GIB, gpu, mig

EIGHT = tuple(
    gpu(i, 80, numa_node=i // 4, nvlink_peers=(f"GPU-{i ^ 1:08d}",)) for i in range(8)
)  # pairs by NVLink, two NUMA nodes


def room(*gib: float) -> dict[str, int]:
    return {f"GPU-{i:08d}": int(g * GIB) for i, g in enumerate(gib)}


def test_one_gpu_is_the_one_with_most_room_and_the_first_of_equals() -> None:
    assert [g[0].id for g in best_first(EIGHT[:3], room(10, 30, 30), 1)] == [1, 2, 0]


def test_two_gpus_are_nvlink_neighbours_before_they_are_the_emptiest() -> None:
    assert [d.id for d in best_first(EIGHT, room(80, 10, 80, 20, 1, 1, 1, 1), 2)[0]] == [2, 3]


def test_of_pairs_whose_smaller_gpu_has_as_much_room_the_one_with_more_in_all_comes_first() -> None:
    unlinked = [gpu(i, 80) for i in range(3)]
    assert [tuple(d.id for d in pair) for pair in best_first(unlinked, room(10, 10, 20), 2)] == [(0, 2), (1, 2), (0, 1)]


def test_four_gpus_share_a_numa_node() -> None:
    assert [d.id for d in best_first(EIGHT, room(*[80] * 8), 4)[0]] == [0, 1, 2, 3]


def test_mig_instances_and_gpus_that_cannot_be_read_are_never_grouped() -> None:
    parent = gpu(0, 80, mig_enabled=True)
    devices = (parent, mig(parent, 1), mig(parent, 2), gpu(1, error="lost"))
    assert best_first(devices, {}, 2) == []
    assert [g[0].uuid for g in best_first(devices, {}, 1)] == ["MIG-0-1", "MIG-0-2"]


@given(st.permutations(range(8)), st.lists(st.integers(0, 80), min_size=8, max_size=8), st.integers(1, 8))
def test_the_order_of_the_scan_does_not_matter(order: list[int], free: list[int], width: int) -> None:
    assert best_first([EIGHT[i] for i in order], room(*free), width) == best_first(EIGHT, room(*free), width)


def test_many_gpus_are_not_all_combined() -> None:
    many = [gpu(i, 80) for i in range(32)]
    random.Random(1).shuffle(many)
    found = best_first(many, room(*range(32)), 16)
    assert len(found[0]) == 16 and len(found) <= 32
