"""What of a GPU's health is stored, and what an earlier release stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.gpu.health import GpuHealth, Healthy, Probation, Quarantined, Until
from pool_managerd.supervision.gpu.stored_health import from_stored, to_stored

EARLIER = {
    "label": "1", "state": "quarantined", "cordoned": False, "reason": "it was bad", "remedy": "reset it", "lost": True,
    "needs_reset": True, "pending": False, "away": False, "parent": None, "pardoned": False, "ecc_seen": 3, "ecc_at": 3,
    "asked": False, "boot_id": "boot-1",
}  # fmt: skip
"""A quarantine as the first release wrote it."""


@pytest.mark.parametrize(
    ("changes", "until"),
    [
        ({}, Until.RESET), ({"asked": True}, Until.WITHDRAWN), ({"pending": True}, Until.REPAIRED),
        ({"asked": True, "pending": True}, Until.OVER),
    ],
)  # fmt: skip
def test_a_quarantine_that_an_earlier_release_wrote_is_read_and_kept(changes: dict[str, bool], until: Until) -> None:
    expected = GpuHealth("u", "1", Quarantined("it was bad", "reset it", lost=True, until=until, ecc_before=3))
    read = from_stored("u", EARLIER | changes, "boot-1")
    assert read == expected
    again: dict[str, Any] | None = to_stored(replace(read, cordoned=True), "boot-1")
    assert again is not None and from_stored("u", again, "boot-1") == replace(expected, cordoned=True)


def test_a_quarantine_of_another_boot_is_over_and_a_cordon_is_not() -> None:
    assert from_stored("u", EARLIER | {"cordoned": True}, "boot-2") == GpuHealth("u", "1", cordoned=True)


def test_what_ends_by_itself_is_not_stored_and_a_cordon_is_whatever_the_state() -> None:
    lost = Quarantined("it is lost", "reboot", lost=True, until=Until.ANSWERS, away=True)
    for state in (Healthy(), Probation("it was lost"), lost):
        health = GpuHealth("u", "1", state)
        assert to_stored(health, "boot-1") is None
        stored = to_stored(replace(health, cordoned=True), "boot-1")
        assert stored is not None and from_stored("u", stored, "boot-1") == GpuHealth("u", "1", cordoned=True)


@pytest.mark.parametrize("broken", [{}, {"cordoned": "yes", "state": 7}, {"state": "quarantined", "boot_id": "boot-1"}])
def test_a_record_that_is_not_well_formed_loses_no_cordon(broken: dict[str, Any]) -> None:
    assert from_stored("u", broken, "boot-1").cordoned == bool(broken.get("cordoned"))
