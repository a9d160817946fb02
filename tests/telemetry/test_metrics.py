"""Series: names and labels as the table says, no series without its pool."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pool_managerd._version import __version__
from pool_managerd.core.baselines import Baseline
from pool_managerd.errors import SpecError
from pool_managerd.telemetry import series
from pool_managerd.telemetry.metrics import Metrics
from tests.api.fake_devices import devices

EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("preload_succeeded", {"duration_ms": 120, "engine": "llamacpp", "pid": 5}),
    ("preload_failed", {"reason": "engine_exited", "duration_ms": 9, "last_error": "x"}),
    ("probe", {"outcome": "timeout"}),
    ("crash", {"crash_class": "signal", "exit_code": 1}),
    ("restart", {"restart_count": 1}),
    ("storm", {"restart_count": 6, "time_window": 60_000}),
    ("breaker", {"class": "cuda", "old_state": "closed", "new_state": "open", "failure_count": 5}),
    ("config_reread", {"outcome": "success"}),
    ("apply", {"outcome": "unchanged"}),
    ("backoff", {"backoff_ms": 1500, "crash_reason": "process_exit"}),
    ("reload_succeeded", {"duration_ms": 40, "downtime_ms": 10}),
    ("reload_failed", {"duration_ms": 40, "reason": "gate"}),
    ("drain_finished", {"duration_ms": 40, "force_stopped": False, "final_lease_count": 0}),
    ("cache_saved", {"slots": 2, "tokens": 4000, "bytes": 9000, "duration_ms": 20}),
    ("cache_restored", {"slots": 2, "tokens": 4000, "duration_ms": 20}),
    ("cache_lost", {"reason": "unproven"}),
    ("handoff", {"outcome": "success", "duration_ms": 2}),
    ("xid", {"device": "0", "xid": 79}),
    ("download", {"outcome": "error", "reason": "fetch_failed", "bytes": 70, "duration_ms": 9}),
    ("model_verified", {"result": "fail", "reason": "verify", "duration_ms": 9}),
    ("models_gc", {"bytes": 500, "deleted": ["hf:org/repo:Q8_0"]}),
    ("device_reset", {"device": "0"}),
]


def status(pool_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "pool_id": pool_id, "state": "ready", "ready": True, "slots_total": 4, "slots_free": 3, "active_leases": 1,
        "restart_rate": 0, "waiting": 2, "circuits": {"general": "closed", "cuda": "closed"},
        "baselines": [Baseline(20.0, 50.0).to_dict()],
    } | changes  # fmt: skip


def event(type_: str, pool_id: str | None = "p", **fields: Any) -> Any:
    return SimpleNamespace(type=type_, pool_id=pool_id, fields=fields)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def full(metrics: Metrics, pool_id: str = "p") -> Metrics:
    for type_, fields in EVENTS:
        metrics.on_event(event(type_, pool_id, **fields))
    metrics.http_request("/pools", "GET", 200)
    return metrics


def test_the_daemons_version_is_a_label_and_there_before_any_pool() -> None:
    (labels,) = [dict(labels) for (name, labels) in samples(Metrics()) if name == "pool_managerd_build_info"]
    assert labels == {"version": __version__, "python_version": platform.python_version()}


def test_every_series_has_the_name_the_type_and_the_labels_of_the_table() -> None:
    metrics = full(Metrics({"node_id": "n1"}))
    memory = {"vram_total_bytes": 2, "vram_free_bytes": 1}
    metrics.attach(lambda: [status("p", **memory), status("demo", **memory)], devices, lambda: True)
    metrics.watch_loop(lambda: 0.25)
    metrics.watch_models(lambda: {"bytes": 5, "active": 2, "retired": 1})
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    described = {spec.name.removesuffix("_total") if spec.kind == "counter" else spec.name: spec for spec in series.ALL}
    assert families.keys() == described.keys()
    for name, family in families.items():
        spec = described[name]
        assert family.type == spec.kind, name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == {*spec.labels, "node_id"}, name


def test_downloads_and_the_cache_of_models_are_counted_without_any_models_name() -> None:
    metrics = Metrics()
    for code in ("fetch_failed", "digest_mismatch"):
        metrics.on_event(event("download", None, model_id="hf:org/repo:Q8_0", outcome="error", reason=code, bytes=70))
    metrics.on_event(event("download", None, model_id="hf:org/repo:Q8_0", outcome="success", reason="none", bytes=30))
    metrics.on_event(event("model_verified", None, result="pass", reason="start", duration_ms=20))
    metrics.on_event(event("models_gc", None, bytes=500))
    assert ("model_cache_bytes", ()) not in samples(metrics), "nobody has looked yet"
    metrics.watch_models(lambda: {"bytes": 5, "active": 2, "retired": 1})
    found = samples(metrics)
    assert found["model_downloads_total", (("outcome", "error"), ("reason", "digest_mismatch"))] == 1
    assert found["model_download_bytes_total", ()] == 170 and found["model_gc_bytes_total", ()] == 500
    assert found["catalog_verifications_total", (("reason", "start"), ("result", "pass"))] == 1
    assert found["model_verify_duration_ms_sum", (("result", "pass"),)] == 20
    assert found["model_cache_bytes", ()] == 5 and found["catalog_entries_total", (("state", "retired"),)] == 1
    assert "org/repo" not in metrics.render().decode()


def test_a_breaker_is_shown_as_a_number_and_counted_when_it_opens() -> None:
    metrics = Metrics()
    metrics.attach(lambda: [status("p", circuits={"general": "half_open", "cuda": "open"}, restart_rate=7)])
    for state in ("open", "half_open", "open", "closed"):
        metrics.on_event(event("breaker", **{"class": "general", "new_state": state}))
    found = samples(metrics)
    general, cuda = (("class", "general"), ("pool_id", "p")), (("class", "cuda"), ("pool_id", "p"))
    assert found["circuit_breaker_state", general] == 2 and found["circuit_breaker_state", cuda] == 1
    assert found["circuit_breaker_open_total", general] == 2
    assert found["restart_rate", (("pool_id", "p"),)] == 7


def test_gauges_show_the_status_of_now_and_go_with_their_pool() -> None:
    metrics, pools = Metrics(), [status("a"), status("b", ready=False, slots_total=None, slots_free=None, state="failed")]
    metrics.attach(lambda: pools)
    found = samples(metrics)
    assert found["pool_ready", (("pool_id", "a"),)] == 1
    assert found["pool_ready", (("pool_id", "b"),)] == 0
    assert found["slots_free", (("pool_id", "a"),)] == found["pool_slots_free", (("pool_id", "a"),)] == 3
    assert ("slots_total", (("pool_id", "b"),)) not in found
    assert found["pool_state", (("pool_id", "b"), ("state", "failed"))] == 1
    pools.clear()
    assert not [key for key in samples(metrics) if ("pool_id", "a") in key[1]]


def test_counters_of_a_removed_pool_are_removed_even_when_late_events_bring_them_back() -> None:
    metrics, pools = Metrics(), [status("p"), status("stays")]
    metrics.attach(lambda: pools)
    full(metrics, "p")
    full(metrics, "stays")
    del pools[0]
    metrics.on_event(event("pool_removed", "p"))
    assert not [key for key in samples(metrics) if ("pool_id", "p") in key[1]]
    metrics.on_event(event("probe", "p", outcome="success"))
    found = samples(metrics)
    assert not [key for key in found if ("pool_id", "p") in key[1]]
    assert found["restart_total", (("pool_id", "stays"),)] == 1


def test_a_pool_shows_its_restarts_as_zero_before_the_first() -> None:
    metrics = Metrics()
    metrics.attach(lambda: [status("p")])
    assert samples(metrics)["restart_total", (("pool_id", "p"),)] == 0


def test_label_values_are_bounded_whatever_arrives() -> None:
    metrics = Metrics()
    metrics.attach(lambda: [status("p")])
    for n in range(100):
        metrics.on_event(event("preload_failed", "p", reason=f"reason {n} {'x' * 500}"))
        metrics.http_request("/pools", f"METHOD{n}", 405)
    found = samples(metrics)
    reasons = {dict(labels)["reason"] for name, labels in found if name == "preload_failure_total"}
    assert len(reasons) == series.LABEL_BUDGETS["reason"] + 1
    assert "other" in reasons
    assert max(map(len, reasons)) <= 64
    assert found["http_requests_total", (("method", "OTHER"), ("route", "/pools"), ("status", "405"))] == 100


def test_events_that_lack_fields_or_are_unknown_do_no_harm() -> None:
    metrics = Metrics()
    for type_, _ in [*EVENTS, ("something_new", {}), ("pool_removed", {})]:
        metrics.on_event(event(type_, None))
    assert metrics.render()


@pytest.mark.parametrize("name", ["pool_id", "le", "a-b", "1x", "__meta", ""])
def test_a_constant_label_that_cannot_be_is_a_config_error(name: str) -> None:
    with pytest.raises(SpecError, match=r"telemetry\.labels"):
        Metrics({name: "x"})


def test_how_fast_a_pool_is_stands_with_what_it_was_measured_with() -> None:
    warm, bench = Baseline(20.0, 12.0, 3, "warm-up of 16 tokens"), Baseline(30.0, 80.0, 3, "bench of 8 tokens", 1, {})
    metrics = Metrics()
    metrics.attach(lambda: [status("p", baselines=[bench.to_dict(), warm.to_dict()]), status("new", baselines=[])])
    found = {key: value for key, value in samples(metrics).items() if key[0] in ("pool_tokens_per_s", "pool_first_token_ms")}
    assert found == {
        (name, (("measured_with", kind), ("pool_id", "p"))): value
        for name, kind, value in (
            ("pool_tokens_per_s", "bench", 80.0), ("pool_tokens_per_s", "warm-up", 12.0),
            ("pool_first_token_ms", "bench", 30.0), ("pool_first_token_ms", "warm-up", 20.0),
        )
    }  # fmt: skip
