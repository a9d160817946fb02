"""One crash as it is told: what it was, how that is known, what to do, and what was done. Frozen, bounded, JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_remedies import MEANINGS, REMEDIES

SCHEMA_VERSION = 1
MAX_EVIDENCE = 12
MAX_TEXT_CHARS = 400
MAX_TAIL_LINES = 20
UNDECIDED = "not decided yet: the GPU's memory is waited for"
UNDONE = "none: it was tried by a reload, which is undone; what ran before goes on"
_ITS_COMMAND = "; `pool-managerd command {pool_id}` shows all that is passed"


class Source(StrEnum):
    """Where a piece of evidence comes from."""

    EXIT_RECORD = "exit_record"
    LOG = "log"
    CGROUP = "cgroup"
    KERNEL_LOG = "kernel_log"
    NVML = "nvml"
    PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Evidence:
    """``offset``: of a log line, where it begins in what this launch has written to its log, in bytes."""

    source: Source
    text: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Remediation:
    """What a person can do: a stable word for machines and a sentence."""

    code: str
    sentence: str


def remediation(code: str, pool_id: str, candidate: str | None = None) -> Remediation:
    """Of a remedy's code; one that this version does not know is read as ``read_log``. ``candidate`` is the replica that was
    tried beside the pool's own engine: what the pool's id alone stands for is that one's.
    """
    known = code if code in REMEDIES else "read_log"
    sentence = REMEDIES[known]
    if candidate is not None:
        sentence = sentence.replace("logs {pool_id}", f"logs {{pool_id}} --replica {candidate}").replace(_ITS_COMMAND, "")
    return Remediation(known, sentence.replace("{pool_id}", pool_id))


@dataclass(frozen=True, slots=True)
class CrashReport:
    """One crash of one launch. ``at_ms`` is unix time, to be shown.

    ``summary`` is the short text of SPEC §8.5, ``last_error`` the sentence with the line that was quoted, ``action`` what was
    done about it. Of ``exit_code`` and ``signal`` one is set where a process has ended by itself. ``log_tail`` is the end of
    what this launch has written. ``candidate``: a reload tried it in the place of the pool's engine, which is not meant.
    """

    pool_id: str
    epoch: int
    at_ms: int
    crash: CrashClass
    replica_id: str = "r0"
    human: str = ""
    summary: str = ""
    last_error: str = ""
    evidence: tuple[Evidence, ...] = ()
    remedy: Remediation = Remediation("read_log", "")
    action: str = UNDECIDED
    exit_code: int | None = None
    signal: str | None = None
    uptime_seconds: float | None = None
    engine: str = ""
    engine_version: str = ""
    log_tail: tuple[str, ...] = ()
    candidate: bool = False

    @property
    def crash_id(self) -> str:
        """Names it for ever: a launch's number is not given twice, unless its pool is forgotten."""
        return f"{self.pool_id}/{self.replica_id}/{self.epoch}/{self.at_ms}"

    def bounded(self) -> CrashReport:
        """Of a size that can be kept: texts, evidence and log are cut."""
        return replace(
            self,
            human=_cut(self.human), summary=_cut(self.summary), last_error=_cut(self.last_error, 4), action=_cut(self.action),
            evidence=tuple(replace(e, text=_cut(e.text)) for e in self.evidence[:MAX_EVIDENCE]),
            engine=_cut(self.engine), engine_version=_cut(self.engine_version),
            log_tail=tuple(_cut(line) for line in self.log_tail[-MAX_TAIL_LINES:]),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As the API shows it and the journal keeps it."""
        return {
            "schema_version": SCHEMA_VERSION, "crash_id": self.crash_id, "ts_ms": self.at_ms, "pool_id": self.pool_id,
            "replica_id": self.replica_id, "epoch": self.epoch, "crash_class": self.crash.value, "human": self.human,
            "summary": self.summary, "last_error": self.last_error,
            "evidence": [{"source": e.source.value, "text": e.text, "offset": e.offset} for e in self.evidence],
            "remediation": {"code": self.remedy.code, "sentence": self.remedy.sentence},
            "action": self.action, "exit_code": self.exit_code, "signal": self.signal, "uptime_seconds": self.uptime_seconds,
            "engine": self.engine, "engine_version": self.engine_version, "log_tail": list(self.log_tail),
            "candidate": self.candidate,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave. Raises ValueError for anything else, and for a newer version's.

        A class, source or remedy that this version does not know is read as ``unknown``, left out, and kept as it is.
        """
        if type(version := data.get("schema_version")) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(f"cannot read a crash report of version {version!r}")
        remedy, number = _mapping(data, "remediation"), data.get("uptime_seconds")
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise ValueError("cannot read a crash report: uptime_seconds")
        classes = set(CrashClass)
        named = _text(data, "crash_class")
        return cls(
            pool_id=_text(data, "pool_id"), epoch=_number(data, "epoch") or 0, at_ms=_number(data, "ts_ms") or 0,
            crash=CrashClass(named) if named in classes else CrashClass.UNKNOWN,
            replica_id=_text(data, "replica_id"), human=_text(data, "human"), summary=_text(data, "summary"),
            last_error=_text(data, "last_error"),
            evidence=tuple(e for raw in _list(data, "evidence") if (e := _evidence(raw)) is not None),
            remedy=Remediation(_text(remedy, "code"), _text(remedy, "sentence")), action=_text(data, "action"),
            exit_code=_number(data, "exit_code"), signal=None if data.get("signal") is None else _text(data, "signal"),
            uptime_seconds=None if number is None else float(number), engine=_text(data, "engine"),
            engine_version=_text(data, "engine_version"), candidate=data.get("candidate") is True,
            log_tail=tuple(str(line) for line in _list(data, "log_tail")),
        )  # fmt: skip


def default_remedy(crash: CrashClass) -> str:
    """The code of what to do where no rule knows better."""
    return MEANINGS[crash].remedy


def _cut(text: str, times: int = 1) -> str:
    limit = times * MAX_TEXT_CHARS
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _evidence(raw: Any) -> Evidence | None:
    if not isinstance(raw, Mapping):
        raise ValueError("cannot read a crash report: evidence")
    source = _text(raw, "source")
    return Evidence(Source(source), _text(raw, "text"), _number(raw, "offset")) if source in set(Source) else None


def _text(data: Mapping[str, Any], key: str) -> str:
    if not isinstance(value := data.get(key), str):
        raise ValueError(f"cannot read a crash report: {key}")
    return value


def _number(data: Mapping[str, Any], key: str) -> int | None:
    value = data.get(key)
    if value is not None and type(value) is not int:
        raise ValueError(f"cannot read a crash report: {key}")
    return value


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(value := data.get(key), list):
        raise ValueError(f"cannot read a crash report: {key}")
    return value


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(value := data.get(key), Mapping):
        raise ValueError(f"cannot read a crash report: {key}")
    return value
