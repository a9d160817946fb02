"""The crash gallery, made of the rules: each class, what is seen, why, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_remedies import MEANINGS, REMEDIES
from pool_managerd.core.crash_rules import Rule, all_meanings

HEAD = """# Crashes

Every failure of a running engine is given a class, from its exit record, the lines that this launch wrote to its log, the
kernel's log and counters, and what its GPUs reported. The class is in `pool-managerd crashes`, in the pool's status
(`last_crash`), in the event `crash`, and is the label `crash_class` of `crashes_total`. It decides what follows: one
marked *deterministic* would end the same way at every start; the others are started again after a backoff.

A class is given only where the evidence leaves no doubt; everything else is `process_exit` or `signal`, with the line that
says most. Reports are kept over restarts of the daemon: the newest 20 of a pool, 500 in all, until the pool is forgotten.
"""
_SIGNS = (
    (r"\(\?!.*?\)", ""), (r"\(\?:([^()|]*)\)\?", r"\1"), (r"\(\?:", "("), (r"(?:\\[Swd]|\.|\[[^\]]*\])(?:\{[\d,]+\}|[+*])", "…"),
    (r"\[(\w)\w*\]", r"\1"), (r"\\b|\^", ""), (r"\\s\*?", " "), (r"\\(.)", r"\1"), (r"(\w)\?(?=\W|$)", r"\1"),
)  # fmt: skip


def crash_page() -> str:
    """The text of crashes.md."""
    parts = [HEAD]
    for crash in CrashClass:
        parts += ["\n".join(_section(crash)), ""]
    return "\n".join(parts)


def _section(crash: CrashClass) -> Iterator[str]:
    meaning = MEANINGS[crash]
    yield f"## {crash.value}\n"
    if crash.deterministic:
        yield "*Deterministic.*\n"
    yield f"**What you see.** {meaning.seen}\n"
    yield f"**Why.** {meaning.why}\n"
    yield f"**What to do.** {_sentence(meaning.remedy)} (`{meaning.remedy}`)"
    rules = [rule for rule in all_meanings() if rule.crash is crash]
    if rules:
        yield "\n| A line of its log like | What to do |\n|---|---|"
        yield from map(_row, rules)


def _row(rule: Rule) -> str:
    return f"| {' or '.join(f'`{line}`' for line in _readable(rule.pattern.pattern))} | {_sentence(rule.remedy)} |"


def _readable(pattern: str) -> list[str]:
    """A pattern as the lines that it stands for, roughly: ``…`` for what may be anything."""
    for part, shown in _SIGNS:
        pattern = re.sub(part, shown, pattern)
    whole = re.split(r"\|(?![^(]*\))", pattern)
    return [line.replace("|", "\\|").replace("`", "").strip() for line in whole]


def _sentence(code: str) -> str:
    return REMEDIES[code].replace("{pool_id}", "POOL").replace("|", "\\|")
