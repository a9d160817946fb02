"""When a GPU is used, and when it is used again."""

from __future__ import annotations

import pytest

from pool_managerd.core.gpu.health import (
    GpuHealth,
    Healthy,
    Probation,
    Quarantined,
    Until,
    after_scan,
    after_xid,
    override,
    withdrawn,
)
from pool_managerd.core.gpu.xid import Verdict, meaning, recovery
from tests.core.gpus import gpu

GOOD = gpu(0)
LOST = gpu(0, error="GPU_IS_LOST (15)")
PAST = "it was lost: GPU_IS_LOST (15); it answers again"
UNREADABLE = gpu(0, unreadable="UNKNOWN (999)")


def scans(t: GpuHealth, *seen: object) -> GpuHealth:
    for device in seen:
        t = after_scan(t, device)  # type: ignore[arg-type]
    return t


def test_a_good_gpu_is_used() -> None:
    assert scans(GpuHealth("u"), GOOD).usable


@pytest.mark.parametrize("seen", [LOST, None])
def test_a_lost_gpu_is_quarantined_and_says_what_to_do(seen: object) -> None:
    t = scans(GpuHealth("u"), GOOD, seen)
    assert isinstance(t.state, Quarantined) and t.lost and not t.usable
    assert "GPU 0 is quarantined: it is lost" in t.objection and "reboot" in t.objection


def test_a_gpu_that_is_back_is_on_probation_for_three_healthy_scans() -> None:
    t = scans(GpuHealth("u"), LOST, GOOD)
    assert isinstance(t.state, Probation) and not t.usable
    assert isinstance(scans(t, GOOD).state, Probation)
    assert scans(t, GOOD, GOOD).usable


def test_a_gpu_on_probation_tells_its_fault_as_past_and_what_is_left_to_wait_for() -> None:
    t = scans(GpuHealth("u"), LOST, GOOD)
    assert t.problem == "GPU 0 is on probation: it was lost: GPU_IS_LOST (15); it answers again"
    assert t.remedy == "wait for 2 more healthy scans, or pool-managerd devices uncordon u"
    t = scans(t, GOOD)
    assert t.problem.endswith("it was lost: GPU_IS_LOST (15); it answers again") and "1 more healthy scan," in t.remedy
    t = scans(t, LOST)
    assert "is quarantined: it is lost: GPU_IS_LOST (15) (reboot" in t.objection
    pending = scans(GpuHealth("u"), gpu(0, reset_pending=True), GOOD)
    assert "waited for a reset" in pending.problem
    cured = scans(after_xid(scans(GpuHealth("u"), gpu(0, ecc_uncorrected=2)), meaning(48), 48), gpu(0, ecc_uncorrected=0))
    assert cured.problem.endswith("Xid 48: an uncorrectable memory error (double bit) occurred; it was reset since")


def test_scans_out_of_turn_do_not_shorten_the_probation() -> None:
    t = scans(GpuHealth("u"), LOST, GOOD)
    for _ in range(9):
        t = after_scan(t, GOOD, periodic=False)
    assert isinstance(t.state, Probation)


def test_a_fault_during_probation_starts_it_again() -> None:
    t = scans(GpuHealth("u"), LOST, GOOD, GOOD, LOST, GOOD)
    assert t.state == Probation(PAST, 1)


def test_after_a_fatal_xid_healthy_scans_do_not_help_until_the_gpu_was_reset() -> None:
    t = after_xid(scans(GpuHealth("u"), gpu(0, ecc_uncorrected=2)), meaning(48), 48)
    t = scans(t, *[gpu(0, ecc_uncorrected=2)] * 9)
    assert isinstance(t.state, Quarantined) and "Xid 48" in str(t.state.reason) and "nvidia-smi --gpu-reset -i u" in str(t.remedy)
    assert scans(t, *[gpu(0, ecc_uncorrected=0)] * 3).usable, "its counters began again"
    assert scans(t, None, GOOD, GOOD, GOOD).usable, "it was away"


def test_a_new_uncorrectable_error_is_held_against_the_gpu() -> None:
    none, one = gpu(0, ecc_uncorrected=0, compute_capability="7.0"), gpu(0, ecc_uncorrected=1, compute_capability="7.0")
    t = scans(GpuHealth("u"), none, one)
    assert isinstance(t.state, Quarantined) and t.lost
    unknown_once = scans(GpuHealth("u"), none, gpu(0, ecc_uncorrected=None), one)
    assert isinstance(unknown_once.state, Quarantined)
    old = scans(GpuHealth("u"), gpu(0, ecc_uncorrected=7), gpu(0, ecc_uncorrected=7))
    assert old.usable, "errors from before the first scan are no news"


def test_a_pending_repair_bars_the_gpu_without_ending_what_runs() -> None:
    t = scans(GpuHealth("u"), gpu(0, reset_pending=True))
    assert isinstance(t.state, Quarantined) and not t.lost
    assert scans(t, gpu(0, reset_pending=True)) == t
    assert scans(t, GOOD, GOOD, GOOD).usable


def test_remedies_name_a_gpu_in_a_way_that_does_not_move() -> None:
    t = after_xid(GpuHealth("GPU-x", "3"), meaning(48), 48)
    moved = scans(t, gpu(2, uuid="GPU-x"))
    assert moved.label == "2" and "-i GPU-x;" in moved.remedy and moved.remedy.endswith("uncordon GPU-x")
    assert scans(GpuHealth("GPU-x", "3", cordoned=True), gpu(2)).remedy == "pool-managerd devices uncordon 2"
    instance = scans(GpuHealth("MIG-x"), gpu(0, uuid="MIG-x", parent_uuid="GPU-x", reset_pending=True))
    assert "--gpu-reset -i GPU-x;" in instance.remedy, "an instance is reset with its GPU"


def test_a_gpu_that_cannot_be_read_takes_no_start_and_keeps_its_state() -> None:
    t = scans(GpuHealth("u"), GOOD, UNREADABLE)
    assert isinstance(t.state, Healthy) and not t.lost and not t.usable
    assert t.objection == "GPU 0 cannot be read: UNKNOWN (999) (run nvidia-smi; see dmesg | grep -i nvrm for the cause)"
    assert not override(t).usable, "nobody can say what it holds"
    assert scans(t, GOOD).usable
    assert "it is lost" in scans(t, LOST).problem and "no longer there" in scans(t, None).problem


def test_a_gpu_that_cannot_be_read_gets_no_further_in_its_probation_and_not_back_either() -> None:
    t = scans(GpuHealth("u"), LOST, GOOD, GOOD, *[UNREADABLE] * 5)
    assert t.state == Probation(PAST, 2) and "on probation" in t.problem
    assert scans(t, GOOD).usable


def test_an_operator_can_clear_a_gpu() -> None:
    assert override(after_xid(GpuHealth("u", cordoned=True), meaning(79), 79)).usable


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109])
def test_the_xids_of_programs_are_not_held_against_the_gpu(xid: int) -> None:
    assert meaning(xid).verdict is Verdict.APPLICATION


@pytest.mark.parametrize("xid", [48, 64, 79, 95, 119])
def test_the_xids_of_broken_gpus_are_fatal_and_have_a_remedy(xid: int) -> None:
    assert meaning(xid).verdict is Verdict.FATAL and meaning(xid).remedy


def test_the_remedy_of_a_reset_releases_the_driver_first_and_says_so_when_an_operator_must_override() -> None:
    remedy = str(after_xid(GpuHealth("u", "3"), meaning(119), 119).remedy)
    steps = ["drain", "pool-managerd devices release", "nvidia-smi --gpu-reset -i u", "devices resume", "devices uncordon u"]
    assert sorted(steps, key=remedy.index) == steps
    pending = scans(GpuHealth("u"), gpu(0, reset_pending=True))
    assert "devices release" in pending.remedy and "uncordon" not in pending.remedy, "that it was reset shows by itself"


@pytest.mark.parametrize(
    ("text", "verdict", "remedy"),
    [
        ("GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)", Verdict.FATAL, "--gpu-reset"),
        ("GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)", Verdict.FATAL, "reboot the machine"),
        ("GPU recovery action changed from 0x0 (None) to 0x2 (OS Reboot)", Verdict.FATAL, "reboot the machine"),
        ("GPU recovery action changed from 0x0 (None) to 0x1 (PF FLR)", Verdict.FATAL, "--gpu-reset"),
        ("GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)", Verdict.FATAL, "--gpu-reset"),
        ("GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)", Verdict.SUSPECT, ""),
        ("", Verdict.SUSPECT, ""),
    ],
)
def test_a_recovery_action_counts_when_one_is_asked_for_from_now_on(text: str, verdict: Verdict, remedy: str) -> None:
    found = meaning(154, text)
    assert found.verdict is verdict and remedy in found.remedy


def test_an_unknown_xid_is_looked_into() -> None:
    assert meaning(9999).verdict is Verdict.SUSPECT


def test_a_gpu_that_asks_for_a_reset_is_not_sent_to_a_reboot() -> None:
    asked = after_scan(GpuHealth("GPU-00000000", "0"), gpu(0, error="RESET_REQUIRED (16)"))
    assert asked.lost and "nvidia-smi --gpu-reset -i GPU-00000000" in str(asked.remedy)
    assert "reboot" in str(after_scan(GpuHealth("GPU-00000000", "0"), gpu(0, error="GPU_IS_LOST (15)")).remedy)


@pytest.mark.parametrize("heard_first", [True, False])
def test_a_contained_memory_error_is_not_held_against_the_gpu_however_its_news_arrive(heard_first: bool) -> None:
    before, counted = gpu(0, ecc_uncorrected=0), gpu(0, ecc_uncorrected=1)
    t = scans(GpuHealth("u"), before)
    t = after_xid(t, meaning(94), 94) if heard_first else after_scan(t, counted)
    t = after_scan(t, counted) if heard_first else after_xid(t, meaning(94), 94)
    assert scans(t, *[counted] * 5).usable
    assert not scans(t, gpu(0, ecc_uncorrected=2), gpu(0, ecc_uncorrected=2)).usable, "the next one needs its own word"


def test_an_uncorrectable_error_that_nobody_calls_contained_is_held_against_the_gpu_at_the_next_periodic_scan() -> None:
    t = scans(GpuHealth("u"), gpu(0, ecc_uncorrected=0), gpu(0, ecc_uncorrected=1))
    assert t.usable and after_scan(t, gpu(0, ecc_uncorrected=1), periodic=False).usable
    assert isinstance(after_scan(t, gpu(0, ecc_uncorrected=1)).state, Quarantined)


def test_the_recovery_that_the_driver_asks_for_is_seen_by_the_first_scan_already() -> None:
    t = after_scan(GpuHealth("u"), gpu(0, recovery_action=1))
    assert isinstance(t.state, Quarantined) and t.lost and t.state.reason == "the driver asks for a recovery (GPU reset)"
    assert isinstance(scans(t, *[gpu(0, recovery_action=1)] * 5).state, Quarantined)
    back = after_scan(t, gpu(0, recovery_action=0))
    assert isinstance(back.state, Probation) and back.problem.endswith("it does not any more")
    assert scans(back, *[gpu(0, recovery_action=0)] * 2).usable


def test_drain_and_reset_lets_what_runs_come_to_its_end() -> None:
    t = after_scan(GpuHealth("u"), gpu(0, recovery_action=4))
    assert isinstance(t.state, Quarantined) and not t.lost
    xid = after_xid(GpuHealth("u"), meaning(154, "changed from 0x0 (None) to 0x4 (Drain and Reset)"), 154)
    assert isinstance(xid.state, Quarantined) and not xid.lost


@pytest.mark.parametrize("action", [3, 5])
def test_a_recovery_that_concerns_several_gpus_ends_no_work_on_one(action: int) -> None:
    assert after_scan(GpuHealth("u"), gpu(0, recovery_action=action)).usable
    text = f"GPU recovery action changed from 0x0 (None) to 0x{action} (Drain P2P)"
    assert meaning(154, text).verdict is Verdict.SUSPECT


def test_the_driver_withdraws_its_demand_and_an_older_fault_stays() -> None:
    demand = after_xid(GpuHealth("u"), meaning(154, "changed from 0x0 (None) to 0x1 (GPU Reset Required)"), 154)
    over = after_xid(demand, meaning(154, "changed from 0x1 (GPU Reset Required) to 0x0 (None)"), 154)
    assert isinstance(scans(demand, GOOD, GOOD, GOOD).state, Quarantined) and scans(over, GOOD, GOOD, GOOD).usable
    broken = after_xid(GpuHealth("u"), meaning(79), 79)
    assert withdrawn(broken) == broken


def test_who_uncordons_a_gpu_whose_driver_still_asks_for_a_recovery_has_the_last_word() -> None:
    t = override(after_scan(GpuHealth("u"), gpu(0, recovery_action=1)))
    assert scans(t, gpu(0, recovery_action=1), gpu(0, recovery_action=1)).usable
    again = scans(t, gpu(0, recovery_action=0), gpu(0, recovery_action=1))
    assert isinstance(again.state, Quarantined)


@pytest.mark.parametrize(
    ("xid", "text", "verdict"),
    [
        (149, "NETIR_LINK_EVT Fatal XC0 i0 Link 00", Verdict.FATAL), (149, "NETIR_LINK_EVT Nonfatal XC0 i0", Verdict.SUSPECT),
        (149, "", Verdict.FATAL), (145, "RLW_REMAP Nonfatal XC1", Verdict.SUSPECT), (145, "RLW_REMAP Fatal XC1", Verdict.FATAL),
        (158, "", Verdict.FATAL), (167, "", Verdict.FATAL), (173, "", Verdict.FATAL), (136, "", Verdict.FATAL),
        (157, "", Verdict.SUSPECT), (161, "", Verdict.SUSPECT), (171, "", Verdict.SUSPECT), (172, "", Verdict.SUSPECT),
        (94, "", Verdict.APPLICATION), (70, "", Verdict.APPLICATION),
    ],
)  # fmt: skip
def test_the_xids_of_the_published_catalogue_are_known(xid: int, text: str, verdict: Verdict) -> None:
    found = meaning(xid, text)
    assert found.verdict is verdict and "does not know" not in found.what


def test_a_gpu_whose_uuid_was_never_read_is_named_by_its_index_in_the_remedy() -> None:
    t = after_scan(GpuHealth("GPU-unknown-1", "1"), gpu(1, uuid="GPU-unknown-1", error="RESET_REQUIRED (16)"))
    assert "nvidia-smi --gpu-reset -i 1;" in str(t.remedy)


def test_a_gpu_that_is_lost_while_it_waits_for_something_waits_for_that_still() -> None:
    pending = scans(GpuHealth("u"), gpu(0, ecc_uncorrected=4), gpu(0, ecc_uncorrected=4, reset_pending=True))
    t = scans(pending, LOST)
    assert isinstance(t.state, Quarantined)
    assert (t.state.reason, t.state.lost, t.state.away) == ("it is lost: GPU_IS_LOST (15)", True, True)
    assert isinstance(pending.state, Quarantined)
    assert (t.state.until, t.state.ecc_before) == (pending.state.until, 4)
    again = scans(t, None)
    assert again.state == t.state, "what is lost already is not lost anew"


def test_a_gpu_that_is_gone_is_not_called_unreadable_any_more() -> None:
    t = scans(GpuHealth("u"), GOOD, UNREADABLE, None)
    assert t.unreadable is None and isinstance(t.state, Quarantined) and "no longer there" in t.problem


def test_what_is_asked_for_while_a_gpu_waits_for_a_repair_is_what_it_waits_for_then() -> None:
    repair = scans(GpuHealth("u"), gpu(0, reset_pending=True))
    asked = scans(repair, gpu(0, reset_pending=True, recovery_action=1))
    assert isinstance(asked.state, Quarantined) and asked.state.until is Until.WITHDRAWN
    assert asked.state.reason == "repaired memory waits for a reset of the GPU", "why it is out of use stays"
    lost = scans(GpuHealth("u"), LOST, gpu(0, recovery_action=1))
    assert isinstance(lost.state, Quarantined) and "asks for a recovery" in lost.state.reason and lost.lost


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("changed from 0x1 (GPU Reset Required) to 0x0 (None)", "the driver asks for no recovery any more"),
        ("changed from 0x0 (None) to 0x2 (Node Reboot Required)", "the driver asks for a recovery (Node Reboot Required)"),
        ("changed from 0x0 (None) to 0x3 (Drain P2P)", "the driver asks for a recovery that concerns several GPUs (Drain P2P)"),
        ("changed from 0x0 (None) to 0x10 (New)", "the driver asks for a recovery that concerns several GPUs (New)"),
    ],
)
def test_a_recovery_action_is_told_in_the_drivers_own_words(text: str, what: str) -> None:
    assert meaning(154, text).what == what
    assert meaning(154, text).withdrawn is ("0x2" not in text)


def test_a_recovery_that_was_asked_without_words_has_ours() -> None:
    assert recovery(1).what == "the driver asks for a recovery (GPU reset)" and recovery(1).asked
    assert recovery(4).lost is False and recovery(6).lost is True
    assert recovery(9).what.endswith("(action 9)") and recovery(5).what.endswith("(recovery of the IMEX domain)")


def test_an_xid_of_a_blackwell_link_is_fatal_by_its_text() -> None:
    assert meaning(149).verdict is Verdict.FATAL and meaning(148).verdict is Verdict.SUSPECT
    assert meaning(149, "NETIR nonfatal").what == "an NVLink reports an error (NETIR)"
    failed = meaning(144, "SAW Fatal error")
    assert failed.what == "an NVLink failed (SAW)" and failed.remedy == meaning(48).remedy != ""
