"""Busy, idle, hung: what is concluded from samples, and what never is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.activity import Activity, ActivityRules, Sample, Track, Verdict, doubtful, ignored, judge, observe
from pool_managerd.core.engines import ENGINES
from pool_managerd.core.health import Counters, read_counters

RULES = ActivityRules(stall_s=60, busy_limit_s=600, gap_s=14)
MIB = 1 << 20


def watched(*samples: Sample, silent_since: float | None = None, rules: ActivityRules = RULES) -> Activity:
    track: Track | None = None
    for sample in samples:
        track = observe(track, sample, rules)
    assert track is not None
    return judge(track, track.last.at, rules, silent_since=silent_since)


def every_5_s(seconds: float, *, cores: float = 0.0, tokens_per_s: float = 0.0, **fields: object) -> list[Sample]:
    """Samples of an engine that uses so many cores and makes so many tokens all the time."""
    times = [5.0 * n for n in range(int(seconds / 5) + 1)]
    return [Sample(t, cpu_s=cores * t, tokens=tokens_per_s * t, **fields) for t in times]  # type: ignore[arg-type]


def test_an_engine_without_requests_is_idle_whatever_it_polls() -> None:
    assert watched(*every_5_s(600, cores=1.0, requests=0)) == Activity(Verdict.IDLE, "has nothing to do", None, 600)
    assert watched(*every_5_s(600, requests=0)).verdict is Verdict.IDLE


def test_requests_that_get_tokens_are_work() -> None:
    found = watched(*every_5_s(3_600, cores=0.0, tokens_per_s=1, requests=3))
    assert found.verdict is Verdict.BUSY and found.why == "is at work (3 requests running or waiting, 0.0 CPUs)"


def test_requests_that_stand_still_for_the_stall_limit_are_a_hung_engine() -> None:
    assert watched(*every_5_s(55, requests=3)).verdict is Verdict.BUSY
    found = watched(*every_5_s(60, requests=3))
    assert found.verdict is Verdict.HUNG
    assert found.why == "3 requests have stood still for 60 s: no token, no CPU time"
    assert "one request has stood still" in watched(*every_5_s(60, requests=1)).why


def test_the_standstill_begins_with_the_first_request_or_the_last_token() -> None:
    free = every_5_s(300, requests=0)
    assert watched(*free, *(Sample(300 + 5 * n, cpu_s=0, tokens=0, requests=1) for n in range(1, 12))).verdict is Verdict.BUSY
    busy = every_5_s(300, requests=2, tokens_per_s=1)
    late = [Sample(300.0 + 5 * n, cpu_s=0, tokens=300, requests=2) for n in range(1, 13)]
    assert watched(*busy, *late[:-1]).verdict is Verdict.BUSY
    assert watched(*busy, *late).verdict is Verdict.HUNG


def test_cpu_time_without_a_token_is_believed_up_to_the_busy_limit() -> None:
    assert watched(*every_5_s(595, cores=1, requests=1)).verdict is Verdict.BUSY
    found = watched(*every_5_s(600, cores=1, requests=1))
    assert found.verdict is Verdict.HUNG and found.why.endswith("for 10 min: no token, whatever CPU it uses")


def test_polling_is_no_work_and_a_busy_gpu_is() -> None:
    assert watched(*every_5_s(60, cores=0.04, requests=1)).verdict is Verdict.HUNG
    assert watched(*every_5_s(60, requests=1, gpu_percent=4)).verdict is Verdict.HUNG
    assert watched(*every_5_s(120, requests=1, gpu_percent=80)).verdict is Verdict.BUSY


def test_a_silent_engine_is_busy_while_it_uses_the_cpu_and_no_longer_than_the_limit() -> None:
    assert watched(*every_5_s(20, cores=1.5), silent_since=0).verdict is Verdict.BUSY
    assert watched(*every_5_s(595, cores=1.5), silent_since=0).verdict is Verdict.BUSY
    found = watched(*every_5_s(600, cores=1.5), silent_since=0)
    assert found.verdict is Verdict.HUNG and found.why.startswith("it has answered nothing for 10 min")


def test_of_a_silent_engine_nothing_moves_or_nothing_is_known() -> None:
    still = watched(*every_5_s(20), silent_since=0)
    assert still.verdict is Verdict.IDLE and still.why == "nothing of it moves"
    stopped = watched(*every_5_s(20, stopped="pid 7 (x)"), silent_since=0)
    assert stopped.why == "nothing of it moves: pid 7 (x) is stopped (SIGSTOP)"
    assert watched(Sample(0), Sample(5), Sample(10), silent_since=0) == Activity()
    assert watched(*every_5_s(0), silent_since=0) == Activity(Verdict.BUSY, "was seen too briefly to tell")


def test_a_stopped_process_is_a_hung_engine_whatever_the_others_do() -> None:
    found = watched(*every_5_s(60, cores=1, requests=0, stopped="pid 7 (EngineCore)"))
    assert found == Activity(Verdict.HUNG, "pid 7 (EngineCore) has been stopped (SIGSTOP) for 60 s", None, 60)
    assert watched(*every_5_s(55, stopped="pid 7 (x)")).verdict is not Verdict.HUNG
    went_on = [*every_5_s(55, stopped="pid 7 (x)", requests=0), Sample(60, cpu_s=0, requests=0), Sample(65, stopped="pid 7 (x)")]
    assert watched(*went_on).verdict is not Verdict.HUNG


def test_what_sleeps_in_the_kernel_and_does_not_move_cannot_be_killed() -> None:
    at = "pid 7 (x) is in uninterruptible sleep (D) in nfs_wait"
    found = watched(*every_5_s(60, blocked=at))
    assert found.verdict is Verdict.UNKILLABLE and found.why == f"{at}, and nothing of it has moved for 60 s"
    assert watched(*every_5_s(60, cores=0.5, blocked=at)).verdict is not Verdict.UNKILLABLE, "it reads a disk"
    woke = [*every_5_s(55, blocked=at), Sample(60, cpu_s=0), *(Sample(60 + 5 * n, cpu_s=0, blocked=at) for n in range(1, 13))]
    assert watched(*woke[:-1]).verdict is not Verdict.UNKILLABLE and watched(*woke).verdict is Verdict.UNKILLABLE
    stuck = [Sample(5.0 * n, cpu_s=min(5.0 * n, 30), blocked=at) for n in range(19)]
    assert watched(*stuck).why == f"{at}, and nothing of it has moved for 60 s"


def test_counters_that_are_asked_in_vain_are_work_in_hand() -> None:
    asked = [replace(sample, unanswered_s=sample.at) for sample in every_5_s(60, requests=0)]
    assert watched(*asked).verdict is Verdict.HUNG
    assert watched(*asked[:-1]).verdict is Verdict.BUSY


def test_without_knowledge_of_the_cpu_only_the_busy_limit_holds() -> None:
    samples = [Sample(5.0 * n, tokens=1, requests=1) for n in range(121)]
    assert watched(*samples[:-1]).verdict is Verdict.BUSY
    assert watched(*samples).verdict is Verdict.HUNG


def test_a_gap_in_our_own_time_discards_what_was_seen() -> None:
    still = every_5_s(55, requests=3)
    assert watched(*still, Sample(70, cpu_s=0, tokens=0, requests=3)).verdict is Verdict.BUSY
    assert watched(*still, Sample(69, cpu_s=0, tokens=0, requests=3)).verdict is Verdict.HUNG
    slept = [*still, Sample(3_600, cpu_s=0, tokens=0, requests=3)]
    assert watched(*slept, silent_since=55).verdict is not Verdict.HUNG, "silence was not seen either"


def test_a_load_moves_by_what_it_reads_logs_and_holds() -> None:
    first = Sample(0, cpu_s=0, data_bytes=0, memory_bytes=5 * MIB, log_bytes=9)
    assert watched(first).loaded_at is None
    for moved in ({"data_bytes": MIB}, {"memory_bytes": 6 * MIB}, {"log_bytes": 10}):
        assert watched(first, replace(first, at=5, **moved)).loaded_at == 5  # type: ignore[arg-type]
    assert watched(first, replace(first, at=5, data_bytes=MIB - 1)).loaded_at is None
    slow = [replace(first, at=float(n), data_bytes=n * MIB // 4) for n in range(9)]
    assert watched(*slow).loaded_at == 8, "slow progress adds up"
    breathing = [replace(first, at=float(n), memory_bytes=(5 + 5 * (n % 2)) * MIB) for n in range(9)]
    assert watched(*breathing).loaded_at == 1, "what comes and goes is no progress"


def test_the_cpu_in_use_is_measured_over_a_second_at_least() -> None:
    track, cores = None, []
    for sample in (Sample(0, cpu_s=0), Sample(0.5, cpu_s=0.4), Sample(1, cpu_s=0.5), Sample(2, cpu_s=0.5)):
        track = observe(track, sample, RULES)
        cores.append(track.cores)
    assert cores == [None, None, 0.5, 0.0]
    assert track is not None and (track.since, track.cpu_at) == (0, 1)


def test_an_engine_at_work_says_only_what_is_known_of_it() -> None:
    assert watched(Sample(0, cpu_s=0), Sample(5, cpu_s=5)).why == "is at work (1.0 CPUs)"
    assert watched(Sample(0, gpu_percent=80), Sample(5, gpu_percent=90)).why == "is at work (its GPU 90 %)"
    assert watched(Sample(0, tokens=1), Sample(5, tokens=2)).why == "is at work"


def test_what_ran_before_a_process_was_seen_to_end_is_no_negative_work() -> None:
    assert watched(Sample(0, cpu_s=50), Sample(5, cpu_s=10), silent_since=0) == Activity(Verdict.IDLE, "nothing of it moves")


def test_doubt_comes_at_half_of_a_limit() -> None:
    def doubted(samples: list[Sample]) -> bool:
        track: Track | None = None
        for sample in samples:
            track = observe(track, sample, RULES)
        assert track is not None
        return doubtful(track, track.last.at, RULES)

    assert not doubted(every_5_s(25, requests=1)) and doubted(every_5_s(30, requests=1))
    assert not doubted(every_5_s(295, requests=1, cores=1)) and doubted(every_5_s(300, requests=1, cores=1))
    assert not doubted(every_5_s(600, requests=0)) and not doubted(every_5_s(600, requests=1, tokens_per_s=1))
    asked = [replace(sample, unanswered_s=sample.at) for sample in every_5_s(30)]
    assert doubted(asked) and not doubted(asked[:-1])


def test_a_prompt_of_our_own_that_is_not_answered_is_work_that_stands_still() -> None:
    """The engine's gauges say that it has no request: they are those of the part of it that hangs."""
    free = every_5_s(300, requests=0)
    assert (
        watched(*free, *(Sample(300 + s, cpu_s=0, tokens=0, requests=0, prompted_s=s) for s in range(5, 60, 5))).verdict
        is Verdict.BUSY
    )
    found = watched(*free, *(Sample(300 + s, cpu_s=0, tokens=0, requests=0, prompted_s=s) for s in range(5, 65, 5)))
    assert found.verdict is Verdict.HUNG
    assert found.why == "a prompt of the daemon's own has not been answered for 60 s: no token, no CPU time"
    works = (Sample(300 + s, cpu_s=s, tokens=0, requests=0, prompted_s=s) for s in range(5, 595, 5))
    assert watched(*free, *works).why.startswith("is at work (a prompt of the daemon's own waiting, 1.0 CPUs")


def test_a_client_that_asked_and_got_no_token_may_be_unknown_to_the_engine() -> None:
    def unknown(samples: list[Sample], *clients: float) -> bool:
        track: Track | None = None
        for sample in samples:
            track = observe(track, sample, RULES)
        assert track is not None
        return ignored(track, track.last.at, RULES, clients)

    idle = every_5_s(300, requests=0)
    assert not unknown(idle) and not unknown(idle, 0.0, 29.0) and unknown(idle, 0.0, 30.0)
    served = [
        *idle,
        Sample(305, cpu_s=0, tokens=9, requests=0),
        *(Sample(305.0 + s, cpu_s=0, tokens=9, requests=0) for s in range(5, 65, 5)),
    ]
    assert not unknown(served, 62.0), "it asked before the last token"
    assert unknown(served, 62.0, 40.0)
    assert not unknown(every_5_s(300, cores=1, requests=0), 40.0) and unknown(every_5_s(600, cores=1, requests=0), 310.0)
    assert not unknown(every_5_s(25, requests=0), 100.0), "we have not looked at it for so long"


# --- whatever the samples are ---------------------------------------------------------------------------------------

steps = st.tuples(
    st.floats(0.5, 14), st.floats(0, 20), st.integers(0, 5), st.integers(0, 50), st.sampled_from([None, 0, 50]), st.booleans()
)


@given(st.lists(steps, min_size=1, max_size=120), st.booleans())
def test_an_engine_whose_tokens_move_is_never_hung(history: list[tuple[float, ...]], silent: bool) -> None:
    at, tokens, samples = 0.0, 0.0, [Sample(0.0, cpu_s=0, tokens=0, requests=1)]
    for gap, cpu, requests, more, gpu, _ in history:
        at, tokens = at + gap, tokens + more + 1
        samples.append(Sample(at, cpu_s=cpu, tokens=tokens, requests=int(requests), gpu_percent=gpu))  # type: ignore[arg-type]
    assert not watched(*samples, silent_since=at - 500 if silent else None).verdict.stands_still


@given(st.lists(steps, min_size=1, max_size=120))
def test_work_that_stands_still_is_hung_by_the_busy_limit_at_the_latest(history: list[tuple[float, ...]]) -> None:
    at, cpu_s, samples = 0.0, 0.0, [Sample(0.0, cpu_s=0, tokens=7, requests=1)]
    for gap, cpu, requests, _, gpu, _ in history:
        at, cpu_s = at + gap, cpu_s + cpu
        samples.append(Sample(at, cpu_s=cpu_s, tokens=7, requests=int(requests) + 1, gpu_percent=gpu))  # type: ignore[arg-type]
    verdict = watched(*samples).verdict
    assert verdict is (Verdict.HUNG if at >= RULES.busy_limit_s else verdict)
    assert verdict is not Verdict.HUNG or at >= RULES.stall_s


@given(st.lists(st.floats(0.5, 14), max_size=120), st.booleans())
def test_of_nothing_nothing_is_concluded(gaps: list[float], silent: bool) -> None:
    at, samples = 0.0, [Sample(0.0)]
    for gap in gaps:
        at += gap
        samples.append(Sample(at))
    rules = replace(RULES, busy_limit_s=math.inf)
    assert watched(*samples, silent_since=0 if silent else None, rules=rules).verdict in (Verdict.UNKNOWN, Verdict.IDLE)


# --- what engines say -----------------------------------------------------------------------------------------------

LLAMACPP = b"""# HELP llamacpp:n_decode_total Total number of llama_decode() calls
# TYPE llamacpp:n_decode_total counter
llamacpp:n_decode_total 758
llamacpp:prompt_tokens_total 208
llamacpp:tokens_predicted_total 2400
llamacpp:prompt_tokens_seconds 2714.66
llamacpp:requests_processing 4
llamacpp:requests_deferred 14
"""
VLLM = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a } b"} 2.0
vllm:num_requests_waiting{engine="0",model_name="a } b"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.5e+03
vllm:generation_tokens_total{engine="0",model_name="m"} 20.0
vllm:generation_tokens_total{engine="1",model_name="m"} 3.0
"""
TGI = b'tgi_batch_current_size 3\ntgi_queue_size 2\ntgi_batch_inference_count{method="decode"} 12\n'


@pytest.mark.parametrize(
    ("engine", "text", "told"),
    [("llamacpp", LLAMACPP, Counters(3366, 18)), ("vllm", VLLM, Counters(1523, 3)), ("tgi", TGI, Counters(12, 5))],
)
def test_the_counters_of_each_engine_are_found(engine: str, text: bytes, told: Counters) -> None:
    names = ENGINES[engine].counters
    assert names is not None
    assert read_counters(text, names) == told
    assert read_counters(text.replace(b"\n", b"\r\n"), names) == told


@given(st.binary(max_size=2_000))
def test_no_text_is_too_strange_for_counters(text: bytes) -> None:
    names = ENGINES["vllm"].counters
    assert names is not None
    assert read_counters(text, names) is None
    assert read_counters(text + b"\nvllm:num_requests_running 2\n" + text, names) == Counters(0, 2)
