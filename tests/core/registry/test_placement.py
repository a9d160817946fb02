"""Which pool takes a request, and why the others do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.registry import DeviceShare, PerfHints, PoolSnapshot, Registry
from pool_managerd.core.registry.placement import PlacementRequest, decide, objection
from tests.core.gpus import GIB

ANY = PlacementRequest()


def pool(pool_id: str, free_gib: float | None = 10, **changes: Any) -> PoolSnapshot:
    registry = Registry(lambda: 0)
    registry.register(pool_id)
    free = None if free_gib is None else int(free_gib * GIB)
    facts = {"state": "ready", "live": True, "ready": True, "slots_total": 4, "slots_free": 4, "ctx_max": 8192,
             "vram_free_bytes": free, "engine": "llamacpp", "model_id": "m"}  # fmt: skip
    return replace(registry.snapshots()[0], **{**facts, **changes})


def on(*labels: str) -> tuple[DeviceShare, ...]:
    return tuple(DeviceShare(int(label), label, f"GPU-{label}", "8.6", 1, 1, 1) for label in labels)


def test_most_free_vram_wins_then_fewest_leases_then_the_id() -> None:
    pools = [pool("c", 10), pool("b", 20, active_leases=2), pool("a", 20, active_leases=1), pool("d", 20, active_leases=1)]
    decision = decide(ANY, pools)
    assert decision.pool_id == "a" and [c.pool_id for c in decision.candidates] == ["a", "d", "b", "c"]
    assert decision.why == "Pool 'a' takes it: 20 GiB of VRAM are free for it, and it has one active lease"


@pytest.mark.parametrize(
    ("request_", "changes", "why"),
    [
        (ANY, {"draining": True}, "it is draining"),
        (ANY, {"ready": False, "state": "backoff", "last_error": "exit_code=1"}, r"it is not ready \(backoff: exit_code=1\)"),
        (ANY, {"slots_free": 0}, "all 4 slots are in use"),
        (PlacementRequest(model="other"), {}, "it serves m"),
        (PlacementRequest(engine="vllm"), {}, "its engine is llamacpp"),
        (PlacementRequest(quantization="Q8_0"), {"quant": "Q4_K_M"}, "its quantisation is Q4_K_M"),
        (PlacementRequest(ctx_tokens=2049), {}, "one request may fill 2048 tokens of its context, not 2049"),
        (PlacementRequest(vram_bytes=10 * GIB + 1), {}, "10 GiB of VRAM are free for it, 10 GiB are needed"),
        (PlacementRequest(device_mask=DeviceMask.parse("0")), {"devices": on("0", "1")}, "GPU 1, outside the mask 0"),
        (PlacementRequest(device_mask=DeviceMask.parse("7")), {"devices": on("0", "1")}, "on GPUs 0, 1, outside the mask 7"),
    ],
)
def test_every_rejected_pool_has_its_reason(request_: PlacementRequest, changes: dict[str, Any], why: str) -> None:
    decision = decide(request_, [pool("a", **changes)])
    assert decision.pool_id is None and decision.code == "no_capacity"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(decision.candidates[0].objection)


def test_equality_fits_and_unknown_facts_do_not_stand_in_the_way() -> None:
    exact = PlacementRequest(vram_bytes=10 * GIB, ctx_tokens=2048, quantization="q4_k_m", device_mask=DeviceMask.parse("GPU-0"))
    assert objection(exact, pool("a", quant="Q4_K_M", devices=on("0"))) is None
    assert objection(PlacementRequest(ctx_tokens=9000), pool("a", ctx_max=None)) is None


def test_memory_that_is_promised_to_others_is_not_free_and_a_pools_own_unused_promise_is() -> None:
    shared = pool("shared", 29, vram_available_bytes=21 * GIB, vram_reserved_bytes=10 * GIB, vram_used_bytes=8 * GIB)
    alone = pool("alone", 24, vram_available_bytes=24 * GIB, vram_reserved_bytes=1 * GIB, vram_used_bytes=2 * GIB)
    unseen = pool("unseen", 30, vram_available_bytes=22 * GIB, vram_reserved_bytes=8 * GIB, vram_used_bytes=None)
    assert [p.vram_room_bytes for p in (shared, alone, unseen)] == [23 * GIB, 24 * GIB, 22 * GIB]
    assert [c.pool_id for c in decide(ANY, [shared, alone, unseen]).candidates] == ["alone", "shared", "unseen"]
    assert objection(PlacementRequest(vram_bytes=23 * GIB), shared) is None
    assert objection(PlacementRequest(vram_bytes=25 * GIB), shared) == "23 GiB of VRAM are free for it, 25 GiB are needed"


def test_a_pinned_pool_is_taken_or_nobody() -> None:
    pools = [pool("a", 20), pool("b", 1), pool("c", draining=True)]
    assert decide(PlacementRequest(pin="b"), pools).pool_id == "b"
    refused = decide(PlacementRequest(pin="c"), pools)
    assert (refused.pool_id, refused.code) == (None, "pinned_pool_infeasible") and "it is draining" in refused.why
    assert "there is no such pool" in decide(PlacementRequest(pin="x"), pools).why


def test_preferred_pools_come_first_and_avoided_ones_last() -> None:
    pools = [pool("a", 20), pool("b", 10), pool("c", 5)]
    assert decide(PlacementRequest(prefer=("c", "b")), pools).pool_id == "b"
    assert decide(PlacementRequest(avoid=("a",)), pools).pool_id == "b"
    fallback = decide(PlacementRequest(prefer=("x",)), pools)
    assert (fallback.pool_id, fallback.fallback) == ("a", True)
    assert fallback.why.startswith("Pool 'a' takes it as a fallback: 20 GiB of VRAM")
    strict = decide(PlacementRequest(prefer=("x",), allow_fallback=False), pools)
    assert (strict.pool_id, strict.code) == (None, "no_preferred_feasible")
    assert strict.why == (
        "No pool takes it: no preferred pool can take it (x: there is no such pool), and the request allows no fallback"
    )
    nobody = decide(PlacementRequest(avoid=("a", "b", "c"), allow_fallback=False), pools)
    assert nobody.why == "No pool takes it: all that could take it are to be avoided, and the request allows no fallback"
    assert decide(PlacementRequest(avoid=("a", "b", "c")), pools).fallback
    assert decide(ANY, []).why == "There is no pool"


def test_each_fact_alone_decides_and_what_was_not_asked_for_does_not() -> None:
    assert objection(PlacementRequest(model="ref"), pool("a", model_ref="ref")) is None
    assert objection(PlacementRequest(model="x"), pool("a", model_id=None)) == "it serves another model"
    assert objection(ANY, pool("a", ready=False, state="offline")) == "it is not ready (offline)"
    assert objection(PlacementRequest(quantization="q"), pool("a")) == "its quantisation is not known"
    hinted = pool("a", quant="x", perf_hints=PerfHints(quantizations=("Q8_0",)))
    assert objection(PlacementRequest(quantization="q8_0"), hinted) is None
    assert objection(PlacementRequest(ctx_tokens=8192), pool("a", slots_total=1)) is None
    assert objection(PlacementRequest(ctx_tokens=8193), pool("a", slots_total=None)) is not None
    outside = objection(PlacementRequest(device_mask=DeviceMask.parse("7")), pool("a", devices=on("0")))
    assert outside == "it runs on GPU 0, outside the mask 7"
    assert objection(PlacementRequest(vram_bytes=1), pool("a", None)) == "0 of VRAM are free for it, 1 B are needed"


def test_a_decision_says_what_spoke_for_it() -> None:
    assert decide(ANY, [pool("a")]).why == "Pool 'a' takes it: it is the only one that can"
    assert decide(ANY, [pool("a", None), pool("b", None)]).why == "Pool 'a' takes it: it has no active leases"
    pinned = decide(PlacementRequest(pin="b"), [pool("a"), pool("b")])
    assert pinned.why == "Pool 'b' takes it: the request names it" and pinned.code == "assigned"
    refused = decide(PlacementRequest(pin="b"), [pool("a"), pool("b", draining=True)])
    assert refused.why == "Pool 'b', which the request names, cannot take it: it is draining"


def test_who_is_ruled_out_is_told_and_of_many_the_first_five() -> None:
    none = decide(ANY, [pool(name, draining=True) for name in "gfedcba"])
    assert none.why == "No pool can take it: " + "; ".join(f"{name}: it is draining" for name in "abcde")
    wish = PlacementRequest(prefer=("b", "a"), avoid=("a",), allow_fallback=False)
    strict = decide(wish, [pool("a"), pool("b", draining=True), pool("c")])
    assert "(b: it is draining; a: is to be avoided, too)" in strict.why
    many = decide(PlacementRequest(prefer=tuple("uvwxyz"), allow_fallback=False), [pool("a")])
    assert "y: there is no such pool)" in many.why and "z:" not in many.why


POOLS = st.lists(
    st.builds(
        pool, st.sampled_from("abcdefgh"), st.one_of(st.none(), st.integers(0, 80)), ready=st.booleans(), draining=st.booleans(),
        active_leases=st.integers(0, 5), slots_free=st.integers(0, 4),
    ),
    unique_by=lambda p: p.pool_id,
)  # fmt: skip
REQUESTS = st.builds(
    PlacementRequest, vram_bytes=st.integers(0, 80 * GIB), ctx_tokens=st.integers(0, 4096),
    pin=st.one_of(st.none(), st.sampled_from("abx")), prefer=st.lists(st.sampled_from("abcd")).map(tuple),
    avoid=st.lists(st.sampled_from("abcd")).map(tuple), allow_fallback=st.booleans(),
)  # fmt: skip


@given(POOLS, REQUESTS, st.randoms())
def test_the_answer_is_feasible_complete_and_does_not_depend_on_the_order(
    pools: list[PoolSnapshot], request_: PlacementRequest, random: Any
) -> None:
    decision = decide(request_, pools)
    shuffled = list(pools)
    random.shuffle(shuffled)
    assert decide(request_, shuffled) == decision
    assert {c.pool_id for c in decision.candidates} == {p.pool_id for p in pools}
    if decision.pool_id is not None:
        chosen = next(p for p in pools if p.pool_id == decision.pool_id)
        assert chosen.ready and not chosen.draining and objection(request_, chosen) is None
    elif request_.allow_fallback and request_.pin is None:
        assert all(c.objection for c in decision.candidates)
