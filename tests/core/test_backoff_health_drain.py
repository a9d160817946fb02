"""The small pure functions: delays, verdicts on answers, drain requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.backoff import BackoffPolicy, BackoffRules, delay_ms
from pool_managerd.core.baselines import Baselines
from pool_managerd.core.drain import MAX_DEADLINE_MS, DrainOutcome, DrainRequest
from pool_managerd.core.health import ProbeOutcome, check_response, next_probe_at, start_gap_ms
from pool_managerd.core.preflight import assert_gpu_only
from pool_managerd.errors import NodeError, SpecError


def test_delays_double_up_to_the_maximum() -> None:
    rules = BackoffRules(jitter=0.0)
    assert [delay_ms(rules, n, seed="") for n in range(1, 9)] == [1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000]


def test_the_maximum_bounds_the_delay_after_the_multiplier_too() -> None:
    assert delay_ms(BackoffRules(jitter=0.0), 6, seed="", multiplier=2.0) == 60_000
    assert delay_ms(BackoffRules(jitter=0.0), 1, seed="", multiplier=2.0) == 2_000


@given(
    st.integers(0, 5000), st.integers(0, 100_000), st.integers(0, 900), st.floats(0, 1), st.integers(1, 50), st.text(max_size=8)
)
def test_a_delay_is_within_its_bounds_and_always_the_same(
    initial: int, most: int, least: int, jitter: float, n: int, seed: str
) -> None:
    rules = BackoffRules(initial_ms=initial, max_ms=most, min_delay_ms=least, jitter=jitter)
    delay = delay_ms(rules, n, seed=seed)
    assert least <= delay <= max(most, least)
    assert delay == delay_ms(rules, n, seed=seed)
    base = min(initial * 2.0 ** min(n - 1, 10), most)
    assert delay <= max(base * (1 + jitter), least) and (delay >= base * (1 - jitter) - 1 or delay == most)


def test_pools_that_fall_together_do_not_come_back_together() -> None:
    delays = {delay_ms(BackoffRules(), 3, seed=f"node:pool-{n}") for n in range(50)}
    assert len(delays) > 25 and all(3600 <= delay <= 4400 for delay in delays)


def test_the_stateful_policy_grows_and_resets() -> None:
    policy = BackoffPolicy(1000, 60_000, jitter_factor=0.0)
    assert [policy.next_delay() for _ in range(3)] == [1000, 2000, 4000]
    policy.reset()
    assert policy.next_delay() == 1000
    with pytest.raises(ValueError, match="cannot"):
        BackoffPolicy(-1, 5)


@pytest.mark.parametrize("wrong", [(-1, 5, 0.1), (5, -1, 0.1), (5, 5, 1.1), (5, 5, -0.1)])
def test_a_policy_of_impossible_numbers_is_refused(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="cannot use a negative delay or a jitter factor outside"):
        BackoffPolicy(*wrong)


def test_a_policy_has_no_least_delay_and_a_tenth_of_jitter() -> None:
    assert BackoffPolicy(0, 0, 0.0).next_delay() == 0
    assert {900 <= BackoffPolicy(1000, 60_000, seed=str(n)).next_delay() <= 1100 for n in range(20)} == {True}
    assert BackoffPolicy(1000, 60_000, seed="a").next_delay() == delay_ms(BackoffRules(min_delay_ms=0), 1, seed="a")


@pytest.mark.parametrize(
    ("status", "kind", "body", "ok"),
    [
        (200, "application/json", b'{"status":"ok"}', True), (200, "", b"", True), (200, "text/plain", b"OK", True),
        (503, "application/json", b'{"error":{}}', False), (204, "", b"", False), (301, "", b"", False),
        (200, "text/html", b"hello", False), (200, "", b" <!DOCTYPE html>", False), (200, "", b"\x00\x01\x02", False),
        (200, "", b"\tok\n", True), (200, "", b"ok\x08", False),
        (200, "", b"x" * 512 + b"\x00", True), (200, "application/json", b'{"status":"ready"}', True),
        (200, "application/json", b'{"status":"loading model"}', False),
    ],
)  # fmt: skip
def test_only_a_plain_200_of_an_engine_is_healthy(status: int, kind: str, body: bytes, ok: bool) -> None:
    result = check_response(status, kind, body)
    assert result.ok is ok
    assert (result.outcome is ProbeOutcome.SUCCESS) is ok and bool(result.reason) is not ok


@given(st.integers(0, 600_000), st.integers(1, 10_000))
def test_readiness_is_noticed_a_few_percent_late_at_most(waited_ms: int, longest_ms: int) -> None:
    gap_ms = start_gap_ms(waited_ms, longest_ms)
    assert 0 < gap_ms <= longest_ms
    assert gap_ms <= max(8, waited_ms / 16)


@given(st.floats(0, 1e6), st.sampled_from([0.2, 1.0, 5.0, 60.0]))
def test_probes_of_ready_engines_share_their_moments_and_come_a_tenth_early_at_most(now: float, interval_s: float) -> None:
    at = next_probe_at(now, interval_s)
    assert now + interval_s * 0.9 - 1e-6 <= at <= now + interval_s + 1e-6


@pytest.mark.parametrize("wrong", [-1, MAX_DEADLINE_MS + 1, True])
def test_a_drain_deadline_outside_its_range_is_refused(wrong: int) -> None:
    with pytest.raises(SpecError, match="deadline_ms"):
        DrainRequest("p", wrong)
    assert DrainRequest("p", 0).deadline_ms == 0
    assert DrainOutcome("p", True, 5, 1).to_dict() == {
        "pool_id": "p",
        "force_stopped": True,
        "duration_ms": 5,
        "final_lease_count": 1,
    }


def test_gpu_only_enforcement_is_immediate_and_says_what_was_looked_for() -> None:
    assert_gpu_only(True)
    with pytest.raises(NodeError, match="GPU-only enforcement: nvcc/nvidia-smi not found"):
        assert_gpu_only(False)


def test_baselines_are_smoothed_and_bounded() -> None:
    known = Baselines(limit=2)
    assert known.observe(("v", "m", ""), 100, 10).first_token_ms == 100
    assert known.observe(("v", "m", ""), 200, 20).first_token_ms == pytest.approx(130)
    known.observe(("v", "n", ""), 1, 1)
    known.observe(("v", "o", ""), 1, 1)
    assert known.get(("v", "m", "")) is None and known.get(("v", "o", "")) is not None
