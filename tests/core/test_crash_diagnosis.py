"""The class of an end: from the exit record, the log, the kernel and the GPUs, the surest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_diagnosis import LATE_LINES, Diagnosis, LaunchLog, diagnose
from pool_managerd.core.crash_report import Source, default_remedy
from pool_managerd.core.gpu.devices import DeviceIncident
from pool_managerd.core.gpu.incidents import as_incident

BAD_FLAG, CUDA = "error: invalid argument: --ctx-siz", "CUDA error: an illegal memory access was encountered"
VICTIM = "Out of memory: Killed process 77 (llama-server)"


def told(record: ExitRecord, *lines: str, was_ready: bool = False, graceful: bool = False, xid: int | None = -1) -> Diagnosis:
    incidents = () if xid == -1 else (as_incident(DeviceIncident(xid, "kernel_log", "GPU-1"), "0"),)
    log = LaunchLog(lines, tuple(range(0, 10 * len(lines), 10)))
    return diagnose(record, log, "llamacpp", was_ready=was_ready, graceful=graceful, incidents=incidents)


@pytest.mark.parametrize(
    ("record", "crash", "summary", "remedy"),
    [
        (ExitRecord(code=0), "process_exit", "exit_code=0", "run_in_foreground"),
        (ExitRecord(code=7), "process_exit", "exit_code=7", "read_log"),
        (ExitRecord(), "unknown", "the exit record was lost", "start_again"),
        (ExitRecord(signal=11), "signal", "signal SIGSEGV", "report_engine_bug"),
        (ExitRecord(signal=9), "signal", "signal SIGKILL", "find_killer"),
        (ExitRecord(signal=15), "signal", "signal SIGTERM", "read_log"),
        (ExitRecord(code=139), "signal", "exit_code=139", "report_engine_bug"),
        (ExitRecord(code=137), "signal", "exit_code=137", "find_killer"),
        (ExitRecord(code=137, oom_kills=1, oom_scope="shared"), "out_of_memory", "out_of_memory", "add_ram"),
        (ExitRecord(code=255), "process_exit", "exit_code=255", "read_log"),
        (ExitRecord(code=147), "process_exit", "exit_code=147", "read_log"),
        (ExitRecord(signal=9, oom_kills=0, oom_scope="engine"), "signal", "signal SIGKILL", "find_killer"),
        (ExitRecord(signal=9, oom_kills=1, oom_scope="engine"), "out_of_memory", "out_of_memory", "add_ram"),
        (ExitRecord(code=1, oom_kills=1, oom_scope="engine"), "out_of_memory", "out_of_memory", "add_ram"),
        (ExitRecord(signal=9, oom_kills=1, oom_scope="shared"), "out_of_memory", "out_of_memory", "add_ram"),
        (ExitRecord(signal=9, oom_kills=1, oom_scope="host"), "out_of_memory", "out_of_memory", "add_ram"),
        (ExitRecord(code=1, oom_kills=1, oom_scope="shared"), "process_exit", "exit_code=1", "read_log"),
        (ExitRecord(code=1, oom_kills=9, oom_scope="host"), "process_exit", "exit_code=1", "read_log"),
        (ExitRecord(signal=9, oom_kills=1, oom_scope="host", stopped_by_us=True), "signal", "signal SIGKILL", "find_killer"),
        (ExitRecord(signal=9, oom_line=VICTIM), "out_of_memory", "out_of_memory", "add_ram"),
        (ExitRecord(code=1, oom_line=VICTIM), "out_of_memory", "out_of_memory", "add_ram"),
    ],
)
def test_an_end_without_a_word(record: ExitRecord, crash: str, summary: str, remedy: str) -> None:
    found = told(record)
    assert (found.crash, found.summary, found.remedy, found.quoted) == (crash, summary, remedy, "")
    assert found.evidence[0].source is Source.EXIT_RECORD
    assert any(e.source in (Source.CGROUP, Source.KERNEL_LOG) for e in found.evidence) == bool(
        record.oom_kills or record.oom_line
    )


def test_a_submitted_engines_code_0_is_graceful_and_no_others_is() -> None:
    assert told(ExitRecord(code=0), CUDA, graceful=True, was_ready=True).crash is CrashClass.GRACEFUL
    assert told(ExitRecord(code=0)).crash is CrashClass.PROCESS_EXIT


def test_a_submitted_engine_that_ends_with_code_0_before_it_was_ready_has_failed() -> None:
    """One that daemonizes does: what answers then is not what was started."""
    found = told(ExitRecord(code=0), graceful=True)
    assert (found.crash, found.remedy) == (CrashClass.PROCESS_EXIT, "run_in_foreground")


def test_a_shells_code_tells_how_its_child_died() -> None:
    found = told(ExitRecord(code=139))
    assert found.evidence[0].text == "exit code 139, as a shell ends whose child died of SIGSEGV"
    assert told(ExitRecord(code=132)).crash is CrashClass.ILLEGAL_INSTRUCTION
    assert told(ExitRecord(code=139), CUDA).crash is CrashClass.CUDA
    assert told(ExitRecord(code=137), CUDA).crash is CrashClass.SIGNAL, "SIGKILL is nobody's own doing"


def test_code_0_of_a_server_whose_worker_failed_is_explained_by_its_log_and_its_gpu() -> None:
    """vLLM's API server ends with 0 when its EngineCore is gone, whatever that died of."""
    assert told(ExitRecord(code=0), CUDA, was_ready=True).crash is CrashClass.CUDA
    assert told(ExitRecord(code=0), was_ready=True, xid=48).crash is CrashClass.ECC
    assert told(ExitRecord(code=0), BAD_FLAG, was_ready=True).crash is CrashClass.PROCESS_EXIT
    killed = "(APIServer pid=7) WARNING 11-26 14:55:36 [core_client.py:817] MPClient: engine core exited unexpectedly"
    found = diagnose(ExitRecord(code=0), LaunchLog((killed,), (0,)), "vllm", was_ready=True)
    assert (found.crash, found.remedy) == (CrashClass.PROCESS_EXIT, "look_at_worker")


def test_a_line_of_the_log_gives_the_class_and_where_it_stands() -> None:
    found = told(ExitRecord(code=1), "loading", BAD_FLAG, "to show complete usage, run with -h")
    assert (found.crash, found.summary, found.remedy) == (CrashClass.BAD_FLAGS, "exit_code=1", "fix_flags")
    (line,) = (e for e in found.evidence if e.source is Source.LOG)
    assert (line.text, line.offset) == (BAD_FLAG, 10)


def test_a_signal_is_explained_by_a_line_only_where_the_two_go_together() -> None:
    assert told(ExitRecord(signal=6), CUDA).crash is CrashClass.CUDA
    assert told(ExitRecord(signal=11), CUDA).crash is CrashClass.CUDA
    assert told(ExitRecord(signal=9), CUDA).crash is CrashClass.SIGNAL
    assert told(ExitRecord(signal=6), BAD_FLAG).crash is CrashClass.SIGNAL
    assert told(ExitRecord(signal=11), BAD_FLAG).crash is CrashClass.SIGNAL


def test_what_would_keep_a_pool_down_is_never_said_of_an_engine_that_was_ready() -> None:
    assert told(ExitRecord(signal=4)).crash is CrashClass.ILLEGAL_INSTRUCTION
    assert "SIGILL" in told(ExitRecord(signal=4)).summary
    assert told(ExitRecord(signal=4), was_ready=True).crash is CrashClass.SIGNAL
    assert told(ExitRecord(code=1), BAD_FLAG, was_ready=True).crash is CrashClass.PROCESS_EXIT
    assert told(ExitRecord(code=1), CUDA, was_ready=True).crash is CrashClass.CUDA


def test_of_an_engine_that_was_ready_its_last_lines_count() -> None:
    lines = (CUDA, *["error: a client went away"] * LATE_LINES)
    assert told(ExitRecord(code=1), *lines).crash is CrashClass.CUDA
    late = told(ExitRecord(code=1), *lines, was_ready=True)
    assert (late.crash, late.quoted, late.evidence[1].offset) == (CrashClass.PROCESS_EXIT, "error: a client went away", 10)


def test_a_line_that_is_merely_the_last_one_is_quoted_and_no_evidence() -> None:
    found = told(ExitRecord(signal=11), "loading", "listening")
    assert found.quoted == "listening" and [e.source for e in found.evidence] == [Source.EXIT_RECORD]


@pytest.mark.parametrize(
    ("xid", "crash"),
    [(79, "driver_reset"), (119, "driver_reset"), (48, "ecc"), (94, "ecc"), (None, "ecc"), (31, "cuda"), (13, "cuda"),
     (43, "cuda"), (45, "signal"), (63, "signal"), (154, "signal")],
)  # fmt: skip
def test_what_the_gpu_met_explains_a_signal(xid: int | None, crash: str) -> None:
    found = told(ExitRecord(signal=6), xid=xid)
    assert found.crash == crash
    assert found.evidence[-1].source is Source.KERNEL_LOG and found.evidence[-1].text.startswith("GPU 0 reported ")


def test_the_gpu_knows_better_than_cuda_what_is_broken_and_the_log_what_is_full() -> None:
    assert told(ExitRecord(signal=6), CUDA, xid=48).crash is CrashClass.ECC
    assert told(ExitRecord(signal=6), CUDA, xid=79).crash is CrashClass.DRIVER_RESET
    assert told(ExitRecord(code=1), "CUDA error: out of memory", xid=31).crash is CrashClass.VRAM_OOM
    assert told(ExitRecord(code=1), BAD_FLAG, xid=31).crash is CrashClass.BAD_FLAGS
    assert told(ExitRecord(signal=9, oom_line=VICTIM), CUDA, xid=48).crash is CrashClass.OUT_OF_MEMORY


def test_how_it_ended_is_told_with_who_ended_it() -> None:
    def ending(record: ExitRecord) -> str:
        return told(record).evidence[0].text

    assert ending(ExitRecord(code=3)) == "exit code 3, by itself"
    assert ending(ExitRecord(signal=11)) == "SIGSEGV (signal 11), not sent by the daemon"
    assert ending(ExitRecord(signal=15, stopped_by_us=True)) == "SIGTERM (signal 15), after a stop was asked for"
    assert ending(ExitRecord()) == "the record of its end was lost"


@pytest.mark.parametrize(
    ("scope", "where"),
    [
        ("engine", "in its own memory cgroup"), (None, "in its own memory cgroup"),
        ("shared", "in the memory cgroup that it shares with others, about when it ended"),
        ("host", "on this machine, about when it ended; which process was killed, the counter does not say"),
    ],
)  # fmt: skip
def test_what_the_kernel_killed_is_evidence_with_its_place(scope: str | None, where: str) -> None:
    found = told(ExitRecord(signal=9, oom_kills=2, oom_scope=scope, oom_line=VICTIM)).evidence[1:]
    assert [(e.source, e.text) for e in found] == [
        (Source.KERNEL_LOG, VICTIM), (Source.CGROUP, f"the kernel killed 2 for want of memory {where}"),
    ]  # fmt: skip


def test_a_port_that_another_program_holds_is_the_cause_whatever_else_was_said() -> None:
    found = told(ExitRecord(code=1), BAD_FLAG).port_taken(8080, "pid 7 (nginx)")
    assert (found.crash, found.remedy) == (CrashClass.PORT_CONFLICT, default_remedy(CrashClass.PORT_CONFLICT))
    assert [e.source for e in found.evidence] == [Source.EXIT_RECORD, Source.LOG, Source.PROBE]
    assert found.evidence[-1].text == "port 8080 is held by pid 7 (nginx)"
    assert told(ExitRecord(code=1)).port_taken(1, "").evidence[-1].text == "port 1 is held by another program"


@given(
    st.builds(
        ExitRecord, code=st.none() | st.integers(0, 255), signal=st.none() | st.integers(1, 64),
        oom_kills=st.none() | st.integers(0, 3), oom_scope=st.none() | st.sampled_from(["engine", "shared", "host", "?"]),
        oom_line=st.none() | st.text(max_size=20), stopped_by_us=st.booleans(),
    ),
    st.lists(st.binary(max_size=120).map(lambda raw: raw.decode("utf-8", "replace")), max_size=20),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_whatever_it_left_it_is_explained(record: ExitRecord, lines: list[str], ready: bool, graceful: bool) -> None:
    found = told(record, *lines, was_ready=ready, graceful=graceful)
    assert found.summary and found.remedy and found.evidence
    if found.crash.deterministic:
        assert not ready
    if found.summary == "out_of_memory":
        assert found.crash is CrashClass.OUT_OF_MEMORY


def test_what_an_engine_said_before_it_was_ready_did_not_end_it() -> None:
    lines = ("no CUDA-capable device is detected", "CUDA error: out of memory", "server is listening", "done request 50")
    log = LaunchLog(lines, (0, 100, 200, 300))
    assert diagnose(ExitRecord(code=1), log, "llamacpp", was_ready=True, ready_at=200).crash is CrashClass.PROCESS_EXIT
    assert diagnose(ExitRecord(code=1), log, "llamacpp", was_ready=True).crash is not CrashClass.PROCESS_EXIT
    late = LaunchLog((*lines, CUDA), (0, 100, 200, 300, 400))
    found = diagnose(ExitRecord(code=1), late, "llamacpp", was_ready=True, ready_at=200)
    assert (found.crash, found.evidence[1].offset) == (CrashClass.CUDA, 400)


@pytest.mark.parametrize(
    "line",
    [
        'received request: {"prompt":"what does CUDA error: out of memory mean?"}',
        "Received request cmpl-1: prompt: 'what does CUDA error: out of memory mean?', params: SamplingParams(n=1)",
        'POST /v1/chat/completions {"messages":[{"role":"user","content":"CUDA error: out of memory"}]}',
    ],
)
def test_the_words_of_a_user_are_no_cause_and_are_not_quoted(line: str) -> None:
    found = told(ExitRecord(code=1), "serving", line, was_ready=True)
    assert (found.crash, found.quoted) == (CrashClass.PROCESS_EXIT, "serving")


def test_a_class_that_is_ruled_out_is_not_taken_from_the_log() -> None:
    lines = ("metrics exporter: bind: Address already in use", "error: tokenizer is corrupt")
    log = LaunchLog(lines, (0, 60))
    assert diagnose(ExitRecord(code=1), log, "llamacpp").crash is CrashClass.PORT_CONFLICT
    found = diagnose(ExitRecord(code=1), log, "llamacpp", ruled_out=CrashClass.PORT_CONFLICT)
    assert found.crash is not CrashClass.PORT_CONFLICT and "tokenizer" in found.quoted
