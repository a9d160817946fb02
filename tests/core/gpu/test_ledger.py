"""VRAM is reserved once, and what others hold counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.accounts import InstanceUsage, Reservation, account, who
from pool_managerd.core.gpu.devices import DeviceProcess
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.gpu.owners import EngineMark, Owner, owners
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.errors import NodeError
from tests.core.gpus import GIB, gpu, mig, process

A, B = InstanceId("a"), InstanceId("b")
A1 = InstanceId("a", "r1")


def want(
    pool: str | InstanceId, gib: float, device: str = "GPU-00000000", *, epoch: int = 1, exclusive: bool = False
) -> Reservation:
    return Reservation(InstanceId(pool) if isinstance(pool, str) else pool, epoch, {device: int(gib * GIB)}, exclusive)


def test_two_starts_cannot_both_take_the_last_memory() -> None:
    ledger, devices = Ledger(), (gpu(0, 24),)
    ledger.reserve(want("a", 14), account(devices, ledger.all(), {}))
    with pytest.raises(NodeError) as refused:
        ledger.reserve(want("b", 14), account(devices, ledger.all(), {}))
    assert refused.value.code == "INSUFFICIENT_VRAM"
    assert "needs 14 GiB on GPU 0" in refused.value.message and "10 GiB of 24 GiB may still be reserved" in refused.value.message
    assert "held by pool a 14 GiB" in refused.value.message
    assert [r.instance_id for r in ledger.all()] == [A]


def test_equality_fits() -> None:
    ledger, devices = Ledger(), (gpu(0, 24),)
    ledger.reserve(want("a", 24), account(devices, [], {}))


def test_foreign_processes_count_and_are_named() -> None:
    devices = (gpu(0, 24, processes=(process(77, 20, name="blender"),)),)
    with pytest.raises(NodeError, match=r"the rest is held by pid 77 \(blender\) 20 GiB"):
        Ledger().reserve(want("a", 5), account(devices, [], {}))


def test_used_memory_that_nobody_is_listed_for_is_foreign() -> None:
    accounts = account((gpu(0, 24, free_gib=20),), [], {})
    assert accounts["GPU-00000000"].foreign_bytes == 4 * GIB
    assert "processes that cannot be seen 4 GiB" in accounts["GPU-00000000"].holders()


def test_what_the_driver_keeps_is_nobodys_and_not_free() -> None:
    accounts = account((gpu(0, 24, vram_reserved_bytes=GIB),), [], {})
    assert (accounts["GPU-00000000"].foreign_bytes, accounts["GPU-00000000"].available_bytes) == (0, 23 * GIB)


def test_an_engine_that_uses_less_than_reserved_keeps_its_reservation_and_one_that_uses_more_counts_with_that() -> None:
    devices = (gpu(0, 24, processes=(process(1, 3), process(2, 9))),)
    accounts = account(devices, [want("a", 5), want("b", 6)], {1: A, 2: B})
    assert accounts["GPU-00000000"].available_bytes == 24 * GIB - 5 * GIB - 9 * GIB
    assert accounts["GPU-00000000"].foreign_bytes == 0


def test_pids_of_another_namespace_do_not_count_twice() -> None:
    """A running pool whose pid cannot be matched is among the memory that is used."""
    devices = (gpu(0, 24, processes=(process(501, 5, certain=False),)),)
    running = account(devices, [want("a", 6)], {}, {A: {}})["GPU-00000000"]
    assert (running.usages[0].used_bytes, running.foreign_bytes, running.available_bytes) == (5 * GIB, 0, 18 * GIB)
    staging = account(devices, [want("a", 6)], {}, {})["GPU-00000000"]
    assert (staging.foreign_bytes, staging.available_bytes) == (5 * GIB, 13 * GIB)


def test_foreign_memory_is_not_taken_for_that_of_an_engine_that_is_still_loading() -> None:
    devices = (gpu(0, 24, processes=(process(501, 14, certain=False),)),)
    before = {A: {"GPU-00000000": 14 * GIB}}
    found = account(devices, [want("a", 10)], {}, before)["GPU-00000000"]
    assert (found.foreign_bytes, found.available_bytes) == (14 * GIB, 0)


def test_a_driver_that_lists_no_process_at_all_does_not_make_our_memory_count_twice() -> None:
    devices = (gpu(0, 24, free_gib=14),)
    found = account(devices, [want("a", 10)], {}, {A: {"GPU-00000000": 0}})["GPU-00000000"]
    assert (found.foreign_bytes, found.available_bytes, found.usages[0].inferred) == (0, 14 * GIB, True)


def test_an_exclusive_pool_shares_with_nobody() -> None:
    ledger, devices = Ledger(), (gpu(0, 24),)
    ledger.reserve(want("a", 1, exclusive=True), account(devices, [], {}))
    with pytest.raises(NodeError, match="pool a is exclusive there"):
        ledger.reserve(want("b", 1), account(devices, ledger.all(), {}))
    busy = (gpu(0, 24, processes=(process(9, 1),)),)
    with pytest.raises(NodeError, match=r"the pool is exclusive and pid 9 \(python\) is there"):
        Ledger().reserve(want("c", 1, exclusive=True), account(busy, [], {}))
    desktop = (gpu(0, 24, processes=(process(9, 1, kind="graphics"),)),)
    Ledger().reserve(want("c", 1, exclusive=True), account(desktop, [], {}))


def test_the_siblings_of_a_mig_instance_are_the_same_hardware() -> None:
    parent = gpu(0, 80, mig_enabled=True)
    devices = (parent, mig(parent, 1), mig(parent, 2))
    ledger = Ledger()
    ledger.reserve(want("a", 1, "MIG-0-1", exclusive=True), account(devices, [], {}))
    with pytest.raises(NodeError, match="exclusive there"):
        ledger.reserve(want("b", 1, "MIG-0-2"), account(devices, ledger.all(), {}))


def test_a_later_launch_of_an_instance_takes_the_place_of_the_earlier() -> None:
    ledger, devices = Ledger(), (gpu(0, 24),)
    ledger.reserve(want("a", 20), account(devices, [], {}))
    ledger.reserve(want("a", 22, epoch=2), account(devices, ledger.all(), {}))
    assert not ledger.release(A, 1)
    assert ledger.release(A, 2) and not ledger.release(A, 2)


# --- two replicas of one pool ---


def test_two_replicas_of_a_pool_each_hold_their_own_reservation_and_both_count() -> None:
    ledger, devices = Ledger(), (gpu(0, 24),)
    ledger.reserve(want(A, 20), account(devices, [], {}))
    with pytest.raises(NodeError, match="4 GiB of 24 GiB may still be reserved"):
        ledger.reserve(want(A1, 20, epoch=2), account(devices, ledger.all(), {}))
    ledger.reserve(want(A1, 4, epoch=2), account(devices, ledger.all(), {}))
    assert account(devices, ledger.all(), {})["GPU-00000000"].available_bytes == 0
    assert not ledger.release(A1, 1), "the epoch of the other replica says nothing of this one"
    assert ledger.release(A, 1) and [(r.instance_id, r.epoch) for r in ledger.all()] == [(A1, 2)]


def test_an_exclusive_pool_shares_with_a_replica_of_its_own_alone() -> None:
    ledger, devices = Ledger(), (gpu(0, 24, processes=(process(1, 9),)),)
    ledger.reserve(want(A, 9, exclusive=True), account(devices, [], {1: A}))
    ledger.reserve(want(A1, 9, epoch=2, exclusive=True), account(devices, ledger.all(), {1: A}))
    with pytest.raises(NodeError, match="pool a is exclusive there"):
        ledger.reserve(want(B, 1), account(devices, ledger.all(), {1: A}))


def test_what_two_replicas_of_a_pool_use_is_never_mixed() -> None:
    marks = [EngineMark(A, 1, 100, "nonce-0"), EngineMark(A1, 2, 200, "nonce-1")]
    listed = (process(100, 5), process(150, 1, nonce="nonce-0"), process(200, 3), process(250, 2, ancestors=(200,)))
    found = {pid: owner.instance_id for pid, owner in owners(listed, marks, {}).items()}
    assert found == {100: A, 150: A, 200: A1, 250: A1}
    (here,) = account((gpu(0, 24, processes=listed),), [want(A, 7), want(A1, 4, epoch=2)], found).values()
    assert [(u.instance_id, u.used_bytes, u.counted_bytes) for u in here.usages] == [
        (A, 6 * GIB, 7 * GIB), (A1, 5 * GIB, 5 * GIB),
    ]  # fmt: skip
    assert (here.foreign_bytes, here.available_bytes) == (0, 12 * GIB)


def test_an_earlier_launch_of_the_same_replica_owns_nothing_of_the_later() -> None:
    earlier = owners([process(100)], [EngineMark(A, 1, 100, "nonce-0")], {})
    assert owners([process(100), process(300)], [EngineMark(A, 2, 300, "nonce-1")], earlier) == {300: Owner(A, 2, None)}


def test_a_copy_is_for_trying_and_what_is_restored_is_not_asked_for() -> None:
    ledger, devices = Ledger(), (gpu(0, 24),)
    ledger.restore(want("a", 30))
    assert ledger.get(A) == want("a", 30) and ledger.get(B) is None and ledger.version == 1
    trial = ledger.copy()
    assert trial.release(A, 1) and trial.all() == [] and ledger.all() == [want("a", 30)]
    ledger.release(A, 1)
    ledger.reserve(want("b", 5), account(devices, ledger.all(), {}))
    assert ledger.version == 3, "every change counts"


def test_a_refusal_tells_machines_what_it_tells_people() -> None:
    devices = (gpu(0, 24, vram_reserved_bytes=GIB, processes=(process(7, 20),)),)
    with pytest.raises(NodeError) as full:
        Ledger().reserve(want("p", 5), account(devices, [], {}))
    error = full.value
    assert (error.code, error.status, error.pool_id) == ("INSUFFICIENT_VRAM", 503, "p")
    assert error.details == {"device": "0", "uuid": "GPU-00000000", "needed_bytes": 5 * GIB, "free_bytes": 3 * GIB}
    assert error.hint == "free memory there, use another GPU, or lower ctx or slots"
    with pytest.raises(NodeError, match=r"needs 24 GiB on one GPU, and GPU 0 .* has 23 GiB when it is empty"):
        Ledger().reserve(want("p", 24), account(devices, [], {}))
    with pytest.raises(NodeError, match=r"needs 23 GiB on GPU 0 .* where 3 GiB of 24 GiB may still be reserved"):
        Ledger().reserve(want("p", 23), account(devices, [], {}))
    with pytest.raises(NodeError) as shared:
        Ledger().reserve(want("p", 1, exclusive=True), account(devices, [], {}))
    assert (shared.value.code, shared.value.status, shared.value.pool_id) == ("GPU_NOT_SHARED", 503, "p")
    assert shared.value.hint == "stop it, or use another GPU"


def test_who_holds_memory_is_named_however_little_is_known() -> None:
    assert who(process(7, name=None)) == "pid 7" and who(process(7, certain=False)) == "driver's pid 7 (python)"
    assert who(process(7, ended=True)) == "pid 7 (python), which has ended and did not give it back"
    devices = (gpu(0, 24, free_gib=20, vram_reserved_bytes=GIB, processes=(process(7, 1), process(3, None))),)
    (here,) = account(devices, [want("a", 2)], {}).values()
    assert (
        here.holders()
        == "pool a 2 GiB, pid 3 (python), pid 7 (python) 1 GiB, processes that cannot be seen 2 GiB, the driver 1 GiB"
    )
    assert account((gpu(0),), [], {})["GPU-00000000"].holders() == "nobody"


def test_what_a_gpu_that_does_not_answer_told_last_is_not_counted_as_used() -> None:
    lost = gpu(0, 24, error="GPU_IS_LOST (15)", processes=(process(7, 20),))
    (here,) = account((lost,), [want("a", 5, exclusive=True)], {7: A}).values()
    assert (here.usages, here.foreign) == ((InstanceUsage(A, 5 * GIB, None, (), True),), ())


def test_of_a_process_whose_memory_the_driver_does_not_tell_nothing_is_used() -> None:
    (here,) = account((gpu(0, 24, free_gib=24, processes=(process(7, None),)),), [want("a", 5)], {7: A}).values()
    assert here.usages == (InstanceUsage(A, 5 * GIB, None, (7,)),) and here.usages[0].measured_bytes is None


def test_memory_that_cannot_be_attributed_goes_to_who_was_launched_into_the_least_of_it() -> None:
    """In a container no pid is ours: what was there before is nobody's of us, the rest is given out in the order of launches."""
    devices = (gpu(0, 24, free_gib=24 - 9),)
    running = {B: {"GPU-00000000": 3 * GIB}, A: {"GPU-00000000": 6 * GIB}}
    (here,) = account(devices, [want("a", 4), want("b", 4)], {}, running).values()
    assert {u.instance_id: u.used_bytes for u in here.usages} == {A: 2 * GIB, B: 4 * GIB}
    assert (here.foreign_bytes, here.inferred_bytes, here.usages[0].measured_bytes) == (3 * GIB, 6 * GIB, None)
    assert not here.attributable and here.unattributable_bytes == 9 * GIB


def test_memory_is_attributable_where_pids_tell_whose_it_is_or_none_is_held() -> None:
    def attributable(*processes: DeviceProcess, free_gib: float | None = None) -> bool:
        return account((gpu(0, 24, free_gib=free_gib, processes=processes),), [], {})["GPU-00000000"].attributable

    assert attributable() and attributable(process(7, 5))
    assert not attributable(process(7, 5, certain=False)) and not attributable(free_gib=20)


def test_a_process_keeps_what_tells_it_from_a_later_one_with_its_pid() -> None:
    assert owners([process(100, start_ticks=9)], MARKS, {}) == {100: Owner(A, 1, 9)}


@given(
    foreign=st.lists(st.integers(0, 30), min_size=2, max_size=2),
    attempts=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 1), st.integers(0, 30), st.booleans()), max_size=30),
)
def test_reserved_and_foreign_never_exceed_what_there_is(foreign: list[int], attempts: list[tuple[str, int, int, bool]]) -> None:
    devices = tuple(gpu(i, 24 + 12 * i, processes=(process(i + 1, foreign[i]),) if foreign[i] else ()) for i in (0, 1))
    ledger = Ledger()
    for epoch, (pool, where, gib, give_back) in enumerate(attempts, 1):
        if give_back:
            ledger.release(InstanceId(pool), epoch)
            continue
        try:
            ledger.reserve(want(pool, gib, devices[where].uuid, epoch=epoch), account(devices, ledger.all(), {}))
        except NodeError as refused:
            assert refused.code == "INSUFFICIENT_VRAM"
        for device, held in zip(devices, foreign, strict=True):
            reserved = sum(r.bytes_by_device.get(device.uuid, 0) for r in ledger.all())
            assert reserved == 0 or reserved + held * GIB <= device.vram_total_bytes


# --- of one that sleeps ---

OLD, NEW = InstanceId("a"), InstanceId("a", "r1")
steps = st.lists(
    st.tuples(st.sampled_from(["lend", "borrower ends", "sleeper ends", "sleeper starts anew"]), st.integers(1, 20)), max_size=12
)


@given(steps)
def test_a_sleeper_and_its_borrower_never_have_more_than_one_of_them_needs_nor_less_than_the_sleeper_had(
    story: list[tuple[str, int]],
) -> None:
    device, ledger, epoch = gpu(0, 24), Ledger(), 1
    had: int | None = 10
    takes: int | None = None
    ledger.reserve(Reservation(OLD, 1, {device.uuid: 10 * GIB}), account([device], [], {}))
    for what, gib in story:
        epoch += 1
        if what == "lend" and had is not None:
            ledger.restore(Reservation(NEW, epoch, {device.uuid: gib * GIB}))
            ledger.lend(OLD, NEW)
            takes = gib
        elif what == "borrower ends":
            ledger.release(NEW, epoch)
            takes = None
        elif what == "sleeper ends":
            ledger.release(OLD, epoch)
            had = None
        elif what == "sleeper starts anew" and takes is None:
            ledger.restore(Reservation(OLD, epoch, {device.uuid: gib * GIB}))
            had = gib
        found = sum(one.bytes_by_device[device.uuid] for one in ledger.all()) // GIB
        assert found == max(had or 0, takes or 0), (what, gib)
        due = ledger.due(OLD)
        assert (None if due is None else due.bytes_by_device[device.uuid] // GIB) == had


def test_a_copy_knows_what_is_lent() -> None:
    ledger = Ledger()
    ledger.restore(Reservation(OLD, 1, {"x": 5}))
    ledger.restore(Reservation(NEW, 2, {"x": 5}))
    ledger.lend(OLD, NEW)
    tried = ledger.copy()
    tried.release(NEW, 2)
    assert tried.get(OLD) == Reservation(OLD, 1, {"x": 5}) and ledger.get(OLD) == Reservation(OLD, 1, {"x": 0})


# --- whose process is it ---

MARKS = [EngineMark(A, 1, 100, "nonce-a"), EngineMark(B, 1, 200, "nonce-b")]


def test_a_process_belongs_to_the_instance_whose_nonce_or_parent_it_has() -> None:
    listed = [process(100), process(150, nonce="nonce-b"), process(160, ancestors=(155, 100)), process(999)]
    assert {pid: o.instance_id for pid, o in owners(listed, MARKS, {}).items()} == {100: A, 150: B, 160: A}


def test_a_process_without_a_mark_whose_parent_has_ended_belongs_to_the_pool_of_its_shim() -> None:
    marks = [EngineMark(A, 1, 100, "nonce-a", 90), EngineMark(B, 1, 200, "nonce-b")]
    listed = [process(160, ancestors=(90, 50)), process(170, ancestors=(50,)), process(180, ancestors=(0,))]
    assert {pid: o.instance_id for pid, o in owners(listed, marks, {}).items()} == {160: A}


def test_a_process_that_has_ended_is_remembered_and_its_pid_in_other_hands_is_not() -> None:
    known = {150: Owner(B, 1, 5000)}
    assert owners([process(150)], MARKS, known) == {150: Owner(B, 1, 5000)}
    assert owners([process(150, start_ticks=6000)], MARKS, known) == {}
    assert owners([process(150)], MARKS[:1], known) == {}


def test_a_pid_that_may_mean_another_process_here_belongs_to_nobody() -> None:
    assert owners([process(100, certain=False)], MARKS, {}) == {}
