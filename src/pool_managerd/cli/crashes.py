"""The crashes of engines: a table of all, and one pool's newest report in full."""

from __future__ import annotations

import sys

from pool_managerd.cli.options import ConfigFile, OptionalPoolId, Output, Url, daemon
from pool_managerd.cli.output import Format, Json, moment, show
from pool_managerd.cli.table import Column, facts, table
from pool_managerd.core.narration import duration

# What it said goes on in a second line and stays; how long it ran goes first, then how it ended, which the class tells, too.
_COLUMNS = (
    Column("WHEN", 3), Column("POOL", 0, least=7, middle=True), Column("UPTIME", 5), Column("EXIT", 4), Column("CLASS", 1),
    Column("ACTION", 6, least=12, wide=True), Column("WHAT", 2, least=32, lines=2),
)  # fmt: skip
_TAIL_LINES = 10


def crashes(pool_id: OptionalPoolId = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the crashes of engines; with an ID, evidence too.

    Newest last, over restarts of the daemon. -o json has all of it: evidence, remedy, what was done, how the log ends.
    """
    path = ("crashes",) if pool_id is None else ("pools", pool_id, "crashes")

    short = output is Format.TABLE and sys.stdout.isatty()

    def rows(found: list[Json]) -> None:
        cells = (
            (moment(crash.get("ts_ms"), short=short), crash.get("pool_id"), _uptime(crash), _exit(crash),
             crash.get("crash_class"), crash.get("action"), _what(crash))
            for crash in found
        )  # fmt: skip
        table(_COLUMNS, cells, empty="no crashes", wide=output is Format.WIDE)
        if pool_id is not None and found:
            sys.stdout.write("\nThe last one:\n")
            _newest(found[-1])

    show(daemon(url, config).get(*path), output, rows)


def _newest(crash: Json) -> None:
    remedy = crash.get("remediation") or {}
    found = [(str(e.get("source")).replace("_", " "), _evidence(e)) for e in crash.get("evidence") or []]
    tail = [str(line) for line in crash.get("log_tail") or [] if str(line).strip()][-_TAIL_LINES:]
    facts(
        (
            ("class", crash.get("crash_class")),
            ("error", crash.get("last_error")),
            *found,
            ("done", crash.get("action")),
            ("remedy", remedy.get("sentence")),
            ("engine", " ".join(str(crash[key]) for key in ("engine", "engine_version") if crash.get(key)) or None),
            *((("log ends" if number == 0 else ""), line) for number, line in enumerate(tail)),
        )
    )


def _evidence(evidence: Json) -> str:
    text, offset = str(evidence.get("text")), evidence.get("offset")
    return text if offset is None else f"{text} (byte {offset} of its log)"


def _uptime(crash: Json) -> str | None:
    lived = crash.get("uptime_seconds")
    return duration(lived) if isinstance(lived, (int, float)) else None


def _exit(crash: Json) -> str | None:
    """The signal, or the code; nothing for one that was ended because it did not serve."""
    code = crash.get("exit_code")
    return str(crash["signal"]) if crash.get("signal") else None if code is None else f"code {code}"


def _what(crash: Json) -> str | None:
    """What is known beyond how it ended: the line of its log that names the cause, else the error, else how its log ends."""
    quoted = next((e.get("text") for e in crash.get("evidence") or [] if e.get("source") == "log"), None)
    told = str(quoted or crash.get("last_error") or "")
    if told and told != crash.get("summary"):
        return told
    tail = [str(line).strip() for line in crash.get("log_tail") or [] if str(line).strip()]
    return f"its log ends: {tail[-1]}" if tail else told or None
