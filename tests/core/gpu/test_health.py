"""When a GPU is used, and when it is used again."""

from __future__ import annotations

import pytest

from pool_managerd.core.gpu.health import DeviceTrust, Trust, judge, look, pardon, relieved
from pool_managerd.core.gpu.xid import Verdict, meaning
from tests.core.gpus import gpu

GOOD = gpu(0)
LOST = gpu(0, error="GPU_IS_LOST (15)")
UNCLEAR = gpu(0, unclear="UNKNOWN (999)")


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


def test_a_gpu_on_probation_tells_its_fault_as_past_and_what_is_left_to_wait_for() -> None:
    t = looks(DeviceTrust("u"), LOST, GOOD)
    assert t.trouble == "GPU 0 is on probation: it was lost: GPU_IS_LOST (15); it answers again"
    assert t.cure == "wait for 2 more good looks, or pool-managerd devices uncordon u"
    t = looks(t, GOOD)
    assert t.trouble.endswith("it was lost: GPU_IS_LOST (15); it answers again") and "1 more good look," in t.cure
    t = looks(t, LOST)
    assert "is quarantined: it is lost: GPU_IS_LOST (15) (reboot" in t.objection
    pending = looks(DeviceTrust("u"), gpu(0, reset_pending=True), GOOD)
    assert "waited for a reset" in pending.trouble
    cured = looks(judge(looks(DeviceTrust("u"), gpu(0, ecc_uncorrected=2)), meaning(48), 48), gpu(0, ecc_uncorrected=0))
    assert cured.trouble.endswith("Xid 48: an uncorrectable memory error (double bit) occurred; it was reset since")


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
    assert t.state is Trust.QUARANTINED and "Xid 48" in str(t.reason) and "nvidia-smi --gpu-reset -i u" in str(t.remedy)
    assert looks(t, *[gpu(0, ecc_uncorrected=0)] * 3).usable, "its counters began again"
    assert looks(t, None, GOOD, GOOD, GOOD).usable, "it was away"


def test_a_new_uncorrectable_error_is_held_against_the_gpu() -> None:
    none, one = gpu(0, ecc_uncorrected=0, compute_capability="7.0"), gpu(0, ecc_uncorrected=1, compute_capability="7.0")
    t = looks(DeviceTrust("u"), none, one)
    assert t.state is Trust.QUARANTINED and t.lost
    unknown_once = looks(DeviceTrust("u"), none, gpu(0, ecc_uncorrected=None), one)
    assert unknown_once.state is Trust.QUARANTINED
    old = looks(DeviceTrust("u"), gpu(0, ecc_uncorrected=7), gpu(0, ecc_uncorrected=7))
    assert old.usable, "errors from before we looked are no news"


def test_a_pending_repair_bars_the_gpu_without_ending_what_runs() -> None:
    t = looks(DeviceTrust("u"), gpu(0, reset_pending=True))
    assert t.state is Trust.QUARANTINED and not t.lost
    assert looks(t, gpu(0, reset_pending=True)) == t
    assert looks(t, GOOD, GOOD, GOOD).usable


def test_remedies_name_a_gpu_in_a_way_that_does_not_move() -> None:
    t = judge(DeviceTrust("GPU-x", "3"), meaning(48), 48)
    moved = looks(t, gpu(2, uuid="GPU-x"))
    assert moved.label == "2" and "-i GPU-x;" in moved.cure and moved.cure.endswith("uncordon GPU-x")
    assert looks(DeviceTrust("GPU-x", "3", cordoned=True), gpu(2)).cure == "pool-managerd devices uncordon 2"
    instance = looks(DeviceTrust("MIG-x"), gpu(0, uuid="MIG-x", parent_uuid="GPU-x", reset_pending=True))
    assert "--gpu-reset -i GPU-x;" in instance.cure, "an instance is reset with its GPU"


def test_a_gpu_that_cannot_be_read_takes_no_start_and_keeps_its_trust() -> None:
    t = looks(DeviceTrust("u"), GOOD, UNCLEAR)
    assert t.state is Trust.OK and not t.lost and not t.usable
    assert t.objection == "GPU 0 cannot be read: UNKNOWN (999) (run nvidia-smi; see dmesg | grep -i nvrm for the cause)"
    assert not pardon(t).usable, "nobody can vouch for figures"
    assert looks(t, GOOD).usable
    assert "it is lost" in looks(t, LOST).trouble and "no longer there" in looks(t, None).trouble


def test_a_gpu_that_cannot_be_read_gets_no_further_in_its_probation_and_not_back_either() -> None:
    t = looks(DeviceTrust("u"), LOST, GOOD, GOOD, *[UNCLEAR] * 5)
    assert (t.state, t.good_looks) == (Trust.PROBATION, 2) and "on probation" in t.trouble
    assert looks(t, GOOD).usable


def test_an_operator_can_pardon_a_gpu() -> None:
    assert pardon(judge(DeviceTrust("u", cordoned=True), meaning(79), 79)).usable


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109])
def test_the_xids_of_programs_are_not_held_against_the_gpu(xid: int) -> None:
    assert meaning(xid).verdict is Verdict.APPLICATION


@pytest.mark.parametrize("xid", [48, 64, 79, 95, 119])
def test_the_xids_of_broken_gpus_are_fatal_and_have_a_remedy(xid: int) -> None:
    assert meaning(xid).verdict is Verdict.FATAL and meaning(xid).remedy


def test_the_remedy_of_a_reset_lets_go_of_the_driver_first_and_says_so_when_an_operator_must_vouch() -> None:
    remedy = str(judge(DeviceTrust("u", "3"), meaning(119), 119).remedy)
    steps = ["drain", "pool-managerd devices release", "nvidia-smi --gpu-reset -i u", "devices resume", "devices uncordon u"]
    assert sorted(steps, key=remedy.index) == steps
    pending = looks(DeviceTrust("u"), gpu(0, reset_pending=True))
    assert "devices release" in pending.cure and "uncordon" not in pending.cure, "that it was reset shows by itself"


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
    asked = look(DeviceTrust("GPU-00000000", "0"), gpu(0, error="RESET_REQUIRED (16)"))
    assert asked.lost and "nvidia-smi --gpu-reset -i GPU-00000000" in str(asked.remedy)
    assert "reboot" in str(look(DeviceTrust("GPU-00000000", "0"), gpu(0, error="GPU_IS_LOST (15)")).remedy)


@pytest.mark.parametrize("heard_first", [True, False])
def test_a_contained_memory_error_is_not_held_against_the_gpu_however_its_news_arrive(heard_first: bool) -> None:
    before, counted = gpu(0, ecc_uncorrected=0), gpu(0, ecc_uncorrected=1)
    t = looks(DeviceTrust("u"), before)
    t = judge(t, meaning(94), 94) if heard_first else look(t, counted)
    t = look(t, counted) if heard_first else judge(t, meaning(94), 94)
    assert looks(t, *[counted] * 5).usable
    assert not looks(t, gpu(0, ecc_uncorrected=2), gpu(0, ecc_uncorrected=2)).usable, "the next one needs its own word"


def test_an_uncorrectable_error_that_nobody_calls_contained_is_held_against_the_gpu_at_the_next_periodic_look() -> None:
    t = looks(DeviceTrust("u"), gpu(0, ecc_uncorrected=0), gpu(0, ecc_uncorrected=1))
    assert t.usable and look(t, gpu(0, ecc_uncorrected=1), periodic=False).usable
    assert look(t, gpu(0, ecc_uncorrected=1)).state is Trust.QUARANTINED


def test_the_recovery_that_the_driver_asks_for_is_seen_by_the_first_look_already() -> None:
    t = look(DeviceTrust("u"), gpu(0, recovery_action=1))
    assert t.state is Trust.QUARANTINED and t.lost and t.reason == "the driver asks for a recovery (GPU reset)"
    assert looks(t, *[gpu(0, recovery_action=1)] * 5).state is Trust.QUARANTINED
    back = look(t, gpu(0, recovery_action=0))
    assert back.state is Trust.PROBATION and back.trouble.endswith("it does not any more")
    assert looks(back, *[gpu(0, recovery_action=0)] * 2).usable


def test_drain_and_reset_lets_what_runs_come_to_its_end() -> None:
    t = look(DeviceTrust("u"), gpu(0, recovery_action=4))
    assert t.state is Trust.QUARANTINED and not t.lost
    xid = judge(DeviceTrust("u"), meaning(154, "changed from 0x0 (None) to 0x4 (Drain and Reset)"), 154)
    assert xid.state is Trust.QUARANTINED and not xid.lost


@pytest.mark.parametrize("action", [3, 5])
def test_a_recovery_that_concerns_several_gpus_ends_no_work_on_one(action: int) -> None:
    assert look(DeviceTrust("u"), gpu(0, recovery_action=action)).usable
    text = f"GPU recovery action changed from 0x0 (None) to 0x{action} (Drain P2P)"
    assert meaning(154, text).verdict is Verdict.SUSPECT


def test_the_driver_takes_its_wish_back_and_an_older_fault_stays() -> None:
    wish = judge(DeviceTrust("u"), meaning(154, "changed from 0x0 (None) to 0x1 (GPU Reset Required)"), 154)
    over = judge(wish, meaning(154, "changed from 0x1 (GPU Reset Required) to 0x0 (None)"), 154)
    assert looks(wish, GOOD, GOOD, GOOD).state is Trust.QUARANTINED and looks(over, GOOD, GOOD, GOOD).usable
    broken = judge(DeviceTrust("u"), meaning(79), 79)
    assert relieved(broken) == broken


def test_who_uncordons_a_gpu_whose_driver_still_asks_for_a_recovery_has_the_last_word() -> None:
    t = pardon(look(DeviceTrust("u"), gpu(0, recovery_action=1)))
    assert looks(t, gpu(0, recovery_action=1), gpu(0, recovery_action=1)).usable
    again = looks(t, gpu(0, recovery_action=0), gpu(0, recovery_action=1))
    assert again.state is Trust.QUARANTINED


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
    t = look(DeviceTrust("GPU-unknown-1", "1"), gpu(1, uuid="GPU-unknown-1", error="RESET_REQUIRED (16)"))
    assert "nvidia-smi --gpu-reset -i 1;" in str(t.remedy)
