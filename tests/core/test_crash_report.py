"""Crash reports: the same after a way through JSON, bounded, and strict about what they read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_remedies import MEANINGS, REMEDIES
from pool_managerd.core.crash_report import (
    MAX_EVIDENCE,
    MAX_TAIL_LINES,
    CrashReport,
    Evidence,
    Remediation,
    Source,
    default_remedy,
    remediation,
)

TEXT = st.text(max_size=80)
REPORTS = st.builds(
    CrashReport, TEXT, st.integers(0, 1 << 40), st.integers(0, 1 << 50), st.sampled_from(CrashClass), TEXT, TEXT, TEXT, TEXT,
    st.lists(st.builds(Evidence, st.sampled_from(Source), TEXT, st.none() | st.integers(0, 1 << 40)), max_size=15).map(tuple),
    st.builds(Remediation, TEXT, TEXT), TEXT, st.none() | st.integers(0, 255), st.none() | TEXT,
    st.none() | st.floats(0, 1e9), TEXT, TEXT, st.lists(TEXT, max_size=30).map(tuple),
)  # fmt: skip
ONE = CrashReport("p", 3, 1_795_000_000_000, CrashClass.CUDA, evidence=(Evidence(Source.LOG, "CUDA error", 5),))


@given(REPORTS)
def test_a_report_is_the_same_after_a_way_through_json(report: CrashReport) -> None:
    assert CrashReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@given(REPORTS)
def test_a_report_is_bounded(report: CrashReport) -> None:
    big = replace(report, log_tail=("é" * 9_000,) * 40, last_error="x" * 50_000, evidence=ONE.evidence * 100).bounded()
    assert len(json.dumps(big.to_json(), ensure_ascii=False)) < 24_000
    assert (len(big.log_tail), len(big.evidence)) == (MAX_TAIL_LINES, MAX_EVIDENCE)
    assert big.bounded() == big


def test_what_a_later_version_added_is_read_as_far_as_it_is_known() -> None:
    data = ONE.to_json()
    data["crash_class"] = "melted"
    data["evidence"].append({"source": "oracle", "text": "?", "offset": None})
    assert CrashReport.from_json({**data, "more": 1}) == replace(ONE, crash=CrashClass.UNKNOWN)


def test_texts_are_kept_whole_up_to_their_limit_and_cut_with_an_ellipsis_beyond() -> None:
    whole, long = "x" * 400, "x" * 401
    for name in ("human", "summary", "action", "engine", "engine_version"):
        kept, cut_off = (replace(ONE, **cast(Any, {name: text})).bounded() for text in (whole, long))
        assert (getattr(kept, name), getattr(cut_off, name)) == (whole, "x" * 399 + "…")
    assert replace(ONE, last_error="x" * 1600).bounded().last_error == "x" * 1600
    cut = replace(ONE, evidence=(Evidence(Source.LOG, long),), log_tail=("first", *["line"] * 19, long)).bounded()
    assert cut.evidence == (Evidence(Source.LOG, "x" * 399 + "…"),)
    assert cut.log_tail == (*["line"] * 19, "x" * 399 + "…"), "the end of the log is what counts"


def test_a_report_is_named_by_its_launch_and_its_moment() -> None:
    assert ONE.crash_id == "p/r0/3/1795000000000"


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2}, {"schema_version": 0}, {"schema_version": True}, {"schema_version": None}, {"evidence": None},
        {"evidence": [1]}, {"log_tail": "x"}, {"remediation": []}, {"exit_code": "1"}, {"uptime_seconds": "1"},
        {"pool_id": None}, {"signal": 9}, {"epoch": 1.5},
    ],
)  # fmt: skip
def test_what_is_no_report_is_not_read(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot read a crash report"):
        CrashReport.from_json({**ONE.to_json(), **change})


def test_every_class_has_a_remedy_and_a_sentence_names_the_pool() -> None:
    for crash in CrashClass:
        assert remediation(default_remedy(crash), "p").code == MEANINGS[crash].remedy
    assert remediation("read_log", "chat").sentence.endswith("`pool-managerd logs chat`.")
    assert remediation("of another version", "p").code == "read_log"
    assert all(code.replace("_", "").isalpha() and code.islower() for code in REMEDIES)


def test_a_remedy_of_a_candidate_leads_to_its_own_log() -> None:
    assert remediation("read_log", "p", "r1").sentence == "Read its log around the end: `pool-managerd logs p --replica r1`."
    flags = remediation("fix_flags", "p", "r1").sentence
    assert "pool-managerd command" not in flags and "pool-managerd command p" in remediation("fix_flags", "p").sentence
