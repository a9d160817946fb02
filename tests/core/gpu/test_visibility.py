"""Which GPUs a node may use at all."""

from __future__ import annotations

import pytest

from pool_managerd.core.gpu.visibility import restrictions, visible
from tests.core.gpus import gpu, mig

WHOLE, PARENT = [gpu(0), gpu(1), gpu(2)], gpu(3, mig_enabled=True)
INSTANCES = [mig(PARENT, 1), mig(PARENT, 2)]
ALL = [*WHOLE, PARENT, *INSTANCES]


def seen(configured: list[int | str], granted: str | None = None) -> list[str]:
    return [d.uuid for d in visible(ALL, restrictions(configured, granted))]


def test_without_a_word_all_gpus_are_used() -> None:
    assert seen([]) == [d.uuid for d in ALL]


@pytest.mark.parametrize(
    ("granted", "uuids"),
    [
        ("1", ["GPU-00000001"]), ("GPU-00000002,0", ["GPU-00000000", "GPU-00000002"]), ("", []), ("-1", []),
        ("0,-1,1", ["GPU-00000000"]), ("GPU-", []), ("NoDevFiles", []), ("7", []), ("MIG-3-2", ["GPU-00000003", "MIG-3-2"]),
        ("3", ["GPU-00000003", "MIG-3-1", "MIG-3-2"]), ("gpu-0000000", ["GPU-00000000", "GPU-00000001", "GPU-00000002",
                                                                        "GPU-00000003", "MIG-3-1", "MIG-3-2"]),
    ],
)  # fmt: skip
def test_what_the_daemon_was_granted_is_honoured(granted: str, uuids: list[str]) -> None:
    assert seen([], granted) == uuids


def test_the_configuration_and_the_grant_must_both_allow_a_gpu() -> None:
    assert seen([0, "GPU1"], "1,2") == ["GPU-00000001"]


def test_indices_stay_those_of_the_machine() -> None:
    assert [d.id for d in visible(ALL, restrictions([2], None))] == [2]


def test_the_rule_says_whose_word_it_is() -> None:
    rules = [str(rule) for rule in restrictions([0], "")]
    assert rules == ["gpu.devices names 0", "CUDA_VISIBLE_DEVICES of the daemon names none"]
