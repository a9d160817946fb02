"""Crash reports, as answers of the API."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pool_managerd.core.crash import CrashClass


class _Part(BaseModel):
    """As every answer: the keys named here stay, later versions may add some."""

    model_config = ConfigDict(extra="allow", defer_build=True)


class CrashEvidence(_Part):
    source: str = Field(description="exit_record, log, cgroup, kernel_log, nvml or probe.")
    text: str
    offset: int | None = Field(None, description="Of a log line: where it begins in what the launch wrote to its log, in bytes.")


class Remediation(_Part):
    code: str = Field(description="A stable word.")
    sentence: str = Field(description="What a person can do.")


class LastCrash(_Part):
    """One crash of one launch."""

    schema_version: int
    crash_id: str
    ts_ms: int
    pool_id: str
    replica_id: str
    epoch: int = Field(description="The launch's number.")
    crash_class: CrashClass
    human: str
    summary: str = Field(description="exit_code=N, signal NAME, out_of_memory, or the class in words.")
    last_error: str = Field(description="The sentence with the line of the log that names the cause.")
    evidence: list[CrashEvidence]
    remediation: Remediation
    action: str = Field(description="What was done about it.")
    exit_code: int | None = None
    signal: str | None = None
    uptime_seconds: float | None = None
    engine: str
    engine_version: str
    candidate: bool = Field(False, description="A reload tried this engine beside the pool's own, which served on or came back.")


class Crash(LastCrash):
    """A crash report."""

    log_tail: list[str] = Field(description="How the log of the launch ends.")
