"""Structured logs (SPEC §14): JSON Lines with the keys at the top level, or a readable form on a terminal.

Libraries log through structlog's API and never configure it; the daemon and the CLI call ``configure_logging`` once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict

from pool_managerd.core.event import Event
from pool_managerd.core.redaction import Redactor
from pool_managerd.telemetry.sink import LogSink

SERVICE = "pool-managerd"
HUMAN_MAX_CHARS = 160
_MESSAGE_MAX_CHARS = 8192
REPEATED_S = 1.0
correlation_id: ContextVar[str | None] = ContextVar("correlation_id", default=None)
_FIRST_KEYS = ("ts", "level", "action", "human", "pool_id")
_LEVELS = {"debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40, "critical": 50}
# What can be read on dark and on light: yellow vanishes on light, dim on both.
_COLOURS = {"warn": "\x1b[1m", "error": "\x1b[31m", "critical": "\x1b[1;31m"}
_PLAIN = "\x1b[0m"


@dataclass(frozen=True, slots=True)
class LogOptions:
    """``format`` auto = pretty on a terminal, else JSON. ``labels`` go on every line."""

    version: str
    format: Literal["auto", "json", "pretty"] = "auto"
    labels: Mapping[str, str] | None = None
    level: str = "info"


class Logging:
    """The configured logging of this process. ``close`` flushes it; ``log_event`` is a listener of the node's events.

    ``redactor`` keeps secrets out of the lines; whoever learns of one tells it.
    """

    def __init__(self, options: LogOptions, sink: LogSink, *, pretty: bool, colour: bool) -> None:
        self._options = options
        self._sink = sink
        self.redactor = Redactor()
        self._render: Callable[[dict[str, Any]], str] = _pretty(colour) if pretty else _json_line
        self._floor = _LEVELS.get(options.level, 20)
        self.trace_ids: Callable[[], Mapping[str, str]] | None = None
        """Of the span that a line is written in; None: this process does not trace."""

    def use_level(self, level: str) -> None:
        """Lines below ``level`` are left out from now on."""
        self._floor = _LEVELS.get(level, 20)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(self._floor))

    def log_event(self, event: Event) -> None:
        """Write a journalled event as one line; probes and leases (``journal=False``) are for metrics only."""
        if event.journal:
            self._write(event.level, event.type, event.human, event.pool_id, dict(event.fields), event.ts_ms)

    def write(
        self, level: str, action: str, human: str, pool_id: str | None = None, fields: Mapping[str, Any] | None = None
    ) -> None:
        """Write one line. Never blocks and never raises for what it was given."""
        self._write(level, action, self.redactor.text(human), pool_id, self.redactor.mapping(fields or {}), 0)

    def _write(self, level: str, action: str, human: str, pool_id: str | None, line: dict[str, Any], ts_ms: int) -> None:
        """One line of what holds no secret any more: an event was cleaned where it was made."""
        level = "warn" if level == "warning" else level
        if _LEVELS.get(level, 20) < self._floor:
            return
        line.update(self._options.labels or {})
        line |= {
            "ts": _timestamp(ts_ms),
            "level": level,
            "service": SERVICE,
            "version": self._options.version,
            "emitted_by": f"{SERVICE}@{self._options.version}",
            "actor": SERVICE,
            "action": action,
            "target": pool_id or line.get("target") or SERVICE,
            "human": _clip(human),
        }
        if len(human) > HUMAN_MAX_CHARS:
            line.setdefault("message", human[:_MESSAGE_MAX_CHARS])
        if pool_id is not None:
            line["pool_id"] = pool_id
        if "correlation_id" not in line and (request := correlation_id.get()) is not None:
            line["correlation_id"] = request
        if self.trace_ids is not None:
            line.update(self.trace_ids())
        self._sink.write(self._render(line))

    def take_event(self, _logger: Any, method: str, event: EventDict) -> EventDict:
        """The last structlog processor: writes the line and drops the event, so that nothing else prints it."""
        fields = dict(event)
        human = str(fields.pop("event", ""))
        action = str(fields.pop("action", "log"))
        pool_id = fields.pop("pool_id", None)
        self.write(method, action, human, None if pool_id is None else str(pool_id), fields)
        raise structlog.DropEvent

    def close(self) -> None:
        self._sink.close()


def configure_logging(options: LogOptions, stream: TextIO | None = None) -> Logging:
    """Route structlog and the standard library's logging to ``stream`` (stderr) through a queue that never blocks."""
    stream = stream or sys.stderr
    pretty = options.format == "pretty" or (options.format == "auto" and stream.isatty())
    colour = pretty and stream.isatty() and not os.environ.get("NO_COLOR")
    # An own descriptor: whoever closes or replaces sys.stderr does not take the log with it.
    output = Logging(options, LogSink(os.dup(stream.fileno())), pretty=pretty, colour=colour)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info, output.take_event],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS.get(options.level, 20)),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_StdlibBridge(output)]
    root.setLevel(logging.WARNING)
    return output


class _StdlibBridge(logging.Handler):
    """Lines of libraries that use the standard library's logging (aiohttp, asyncio) come out in the same form.

    One that says the same again and again is heard once a second: asyncio says it a thousand times where no descriptor is free.
    """

    def __init__(self, output: Logging) -> None:
        super().__init__()
        self._output = output
        self._said, self._until, self._repeated = ("", ""), 0.0, 0

    def _is_repeated(self, said: tuple[str, str]) -> bool:
        now, again = time.monotonic(), said == self._said
        if again and now < self._until:
            self._repeated += 1
            return True
        self._said, self._until, self._repeated = said, now + REPEATED_S, self._repeated if again else 0
        return False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            if self._is_repeated((record.name, message)):
                return
            fields: dict[str, Any] = {"logger": record.name}
            if self._repeated:
                fields["repeated"], self._repeated = self._repeated, 0
            if record.exc_info:
                fields["exception"] = logging.Formatter().formatException(record.exc_info)
            self._output.write(record.levelname.lower(), "log", message, None, fields)
        except Exception:  # noqa: BLE001 - a log line that cannot be made must not take its caller down
            self.handleError(record)


def _timestamp(ts_ms: int) -> str:
    moment = datetime.fromtimestamp(ts_ms / 1000, UTC) if ts_ms else datetime.now(UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _clip(text: str) -> str:
    return text if len(text) <= HUMAN_MAX_CHARS else text[: HUMAN_MAX_CHARS - 1] + "…"


def _json_line(line: dict[str, Any]) -> str:
    ordered = {key: line[key] for key in _FIRST_KEYS if key in line} | line
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"), default=str)


def _pretty(colour: bool) -> Callable[[dict[str, Any]], str]:
    shown = ("last_error", "exit_code", "signal", "backoff_ms", "duration_ms", "exception", "correlation_id")

    def render(line: dict[str, Any]) -> str:
        clock = line["ts"][11:23]
        said = str(line.get("message") or line["human"])  # whole: a person has no other line to look at
        text = _printable(said)
        values = ((key, str(line[key])) for key in shown if line.get(key) is not None)
        extra = " ".join(f"{key}={_printable(value)}" for key, value in values if key != "last_error" or value not in said)
        start = _COLOURS.get(line["level"], "") if colour else ""
        return f"{clock} {start}{line['level']:<8}{text}{start and _PLAIN}{'  ' * bool(extra)}{extra}"

    return render


def _printable(text: str) -> str:
    """Control characters would let an engine's output steer the terminal."""
    return "".join(c if c.isprintable() else "\n" if c == "\n" else repr(c)[1:-1] for c in text)
