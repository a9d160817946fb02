"""Which line of an engine's log names the cause of its end, by the rules of `core.crash_rules`, over the lines of one launch.

The last line hardly ever does: engines end with a farewell, a hint at their help, a debugger's or a resource tracker's
remarks. Lines are foreign text: each is looked at up to a fixed length, by patterns that take time linear in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_rules import PARTING, Rule, meanings_of, tiers_of
from pool_managerd.core.engines import ENGINES

MAX_LINE_CHARS = 2_000
MAX_EVIDENCE_CHARS = 300

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|\][^\x07\x1b]{0,512}(?:\x07|\x1b\\)|[ -/]{0,8}[0-~])|\x00+")
_PROGRESS = re.compile(r"\d ?%|\d/\d|\b(?:it/s|s/it)\b")
_OF_A_REQUEST = re.compile(r"""\b(?:prompts?|content|inputs?)\b['"]?\s*[:=]""", re.IGNORECASE)
"""What follows may be the words of a user, who can write of any error."""
_ERROR_LEVEL = re.compile(r"\d+(?:\.\d+){1,5} E ")
_PREFIX = re.compile(
    r"E |\d+(?:\.\d+){1,5} [DIWE] |\(\w+ ?(?:rank=\d+ )?(?:pid=\d+)?\) (?:(?:ERROR|WARNING|INFO) [\d: -]+\[\S+\] )?"
)


@dataclass(frozen=True, slots=True)
class Cause:
    """The line that says most, clean and short: which one it is (``at``), and the ``rule`` that knows what it means, if any.

    ``named`` false: none is known to name a cause, and it is merely the last one.
    """

    text: str = ""
    at: int | None = None
    named: bool = False
    rule: Rule | None = None

    @property
    def crash(self) -> CrashClass | None:
        """The class that the line gives, where it leaves no doubt."""
        return self.rule.crash if self.rule is not None else None

    @property
    def remedy(self) -> str:
        return self.rule.remedy if self.rule is not None else ""


def find_cause(lines: Sequence[str], engine: str, *, ruled_out: CrashClass | None = None) -> Cause:
    """What in ``lines`` (one launch's log, oldest first) names why ``engine`` ended; a line of the class ``ruled_out`` does not.

    Without any that is known to name a cause, the last one that is no parting line; an empty text when there is none.
    """
    kind = ENGINES.get(engine)
    log = kind.log if kind is not None else ""
    said = list(_said(lines))
    whole = "\n".join(line for _, line in said)  # one search per rule in all of it is much less than one per line
    tiers = [tier.within(whole) for tier in tiers_of(log)]
    best, found, at = len(tiers), "", None
    for number, line in said:
        for rank, tier in enumerate(tiers[: best + 1]):
            if rank == best and not tier.last:
                break  # the first at this rank stays
            if _names(tier.rules, line) and not (ruled_out and _class_of(line, log) is ruled_out):
                best, found, at = rank, line, number
                break
    if at is None:
        last = (
            (number, line) for number, line in reversed(said)
            if line.strip() and PARTING.search(line) is None and _OF_A_REQUEST.search(line) is None
        )  # fmt: skip
        at, found = next(last, (None, ""))
        return Cause(_quoted(found), at)
    seen = _matching(tiers[best].rules, found)
    part = seen.groupdict().get("said") if seen is not None else None
    return Cause(_quoted(part or found), at, named=True, rule=_meaning(found, log))


def _meaning(line: str, log: str) -> Rule | None:
    return next((rule for rule in meanings_of(log) if rule.pattern.search(line) is not None), None)


def _class_of(line: str, log: str) -> CrashClass | None:
    rule = _meaning(line, log)
    return None if rule is None else rule.crash


def _names(rules: Iterable[Rule], line: str) -> bool:
    """Whether one of ``rules`` finds in ``line`` what is the engine's own and no farewell."""
    found = _matching(rules, line)
    return found is not None and PARTING.search(line) is None and _OF_A_REQUEST.search(line, 0, found.start()) is None


def _matching(rules: Iterable[Rule], line: str) -> re.Match[str] | None:
    return next((found for rule in rules if (found := rule.pattern.search(line)) is not None), None)


def pieces(text: str) -> Iterator[str]:
    """The lines of raw output as a terminal would leave them: without colours, and of a progress bar its last state.

    A carriage return begins a new piece: an error that overwrites a progress bar is a line of its own.
    """
    for line in text.split("\n"):
        parts = [part for part in line.split("\r") if part.strip()]
        for number, part in enumerate(parts, 1):
            if number == len(parts) or _PROGRESS.search(part[:MAX_LINE_CHARS]) is None:
                yield _ESCAPES.sub("", part).rstrip()


def _said(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Each piece, cut, and the number of its line; of llama.cpp's stamp the level stays in front of those that are errors."""
    for number, line in enumerate(lines):
        for piece in pieces(line[: 8 * MAX_LINE_CHARS]):
            text = piece[:MAX_LINE_CHARS]
            error = _ERROR_LEVEL.match(text)
            yield number, "E " + text[error.end() :] if error else text


def _quoted(line: str) -> str:
    prefix = _PREFIX.match(line)
    plain = " ".join(line[prefix.end() if prefix else 0 :].split())
    return plain if len(plain) <= MAX_EVIDENCE_CHARS else plain[: MAX_EVIDENCE_CHARS - 1] + "…"
