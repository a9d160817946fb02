"""When a GPU is used, and when it is used again."""

from __future__ import annotations

import pytest

from pool_managerd.core.device_trust import DeviceTrust, Trust, judge, look, pardon
from pool_managerd.core.xid import Verdict, meaning
from tests.core.gpus import gpu

GOOD = gpu(0)
LOST = gpu(0, error="GPU_IS_LOST (15)")


def looks(t: DeviceTrust, *seen: object) -> DeviceTrust:
    for device in seen:
        t = look(t, device)  # type: ignore[arg-type]
    return t


def test_a_good_gpu_is_trusted() -> None:
    assert looks(DeviceTrust("u"), GOOD).usable


@pytest.mark.parametrize("seen", [LOST, None])
def test_a_lost_gpu_is_quarantined_and_says_what_to_do(seen: object) -> None:
    t = looks(DeviceTrust("u"), GOOD, seen)
    assert t.state is Trust.QUARANTINED and t.lost and not t.usable
    assert "GPU 0 is quarantined: it is lost" in t.objection and "reboot" in t.objection


def test_a_gpu_that_is_back_is_on_probation_for_three_good_looks() -> None:
    t = looks(DeviceTrust("u"), LOST, GOOD)
    assert t.state is Trust.PROBATION and not t.usable
    assert looks(t, GOOD).state is Trust.PROBATION
    assert looks(t, GOOD, GOOD).usable


def test_looks_out_of_turn_do_not_shorten_the_probation() -> None:
    t = looks(DeviceTrust("u"), LOST, GOOD)
    for _ in range(9):
        t = look(t, GOOD, periodic=False)
    assert t.state is Trust.PROBATION


def test_a_fault_during_probation_starts_it_again() -> None:
    t = looks(DeviceTrust("u"), LOST, GOOD, GOOD, LOST, GOOD)
    assert (t.state, t.good_looks) == (Trust.PROBATION, 1)


def test_after_a_fatal_xid_good_looks_do_not_help_until_the_gpu_was_reset() -> None:
    t = judge(looks(DeviceTrust("u"), gpu(0, ecc_uncorrected=2)), meaning(48), 48)
    t = looks(t, *[gpu(0, ecc_uncorrected=2)] * 9)
    assert t.state is Trust.QUARANTINED and "Xid 48" in str(t.reason) and "nvidia-smi --gpu-reset -i 0" in str(t.remedy)
    assert looks(t, *[gpu(0, ecc_uncorrected=0)] * 3).usable, "its counters began again"
    assert looks(t, None, GOOD, GOOD, GOOD).usable, "it was away"


def test_a_new_uncorrectable_error_is_held_against_the_gpu() -> None:
    t = looks(DeviceTrust("u"), gpu(0, ecc_uncorrected=0), gpu(0, ecc_uncorrected=1))
    assert t.state is Trust.QUARANTINED and t.lost
    old = looks(DeviceTrust("u"), gpu(0, ecc_uncorrected=7), gpu(0, ecc_uncorrected=7))
    assert old.usable, "errors from before we looked are no news"


def test_a_pending_repair_bars_the_gpu_without_ending_what_runs() -> None:
    t = looks(DeviceTrust("u"), gpu(0, reset_pending=True))
    assert t.state is Trust.QUARANTINED and not t.lost
    assert looks(t, gpu(0, reset_pending=True)) == t
    assert looks(t, GOOD, GOOD, GOOD).usable


def test_an_operator_can_pardon_a_gpu() -> None:
    assert pardon(judge(DeviceTrust("u", cordoned=True), meaning(79), 79)).usable


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109])
def test_the_xids_of_programs_are_not_held_against_the_gpu(xid: int) -> None:
    assert meaning(xid).verdict is Verdict.APPLICATION


@pytest.mark.parametrize("xid", [48, 64, 79, 95, 119])
def test_the_xids_of_broken_gpus_are_fatal_and_have_a_remedy(xid: int) -> None:
    assert meaning(xid).verdict is Verdict.FATAL and meaning(xid).remedy


def test_a_recovery_action_counts_only_when_one_is_asked_for() -> None:
    assert meaning(154, "changed from 0x0 (None) to 0x1 (GPU Reset Required)").verdict is Verdict.FATAL
    assert meaning(154, "changed from 0x1 to 0x0 (None)").verdict is Verdict.SUSPECT
    assert meaning(9999).verdict is Verdict.SUSPECT
