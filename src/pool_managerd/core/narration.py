"""Short human-readable sentences, in the present tense, about what was decided and why (ORCH-3300, ORCH-3312).

They stand beside the structured fields and never replace them; no secrets, no opaque ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(B|KiB|MiB|GiB|TiB)", re.ASCII | re.IGNORECASE)
_UNITS = MappingProxyType({"b": 0, "kib": 10, "mib": 20, "gib": 30, "tib": 40})


MAX_TEXT_CHARS = 2_000
MAX_WORD_CHARS = 200
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{MAX_WORD_CHARS},}}")


def shortened(text: str) -> str:
    """``text`` as it may be kept: words of more than 200 characters without their middle, at most 2,000 in all."""
    if len(text) > MAX_WORD_CHARS:
        text = _LONG_WORD.sub(lambda word: f"{word[0][:120]}…{word[0][-60:]}", text)
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "…"


def printable(text: str) -> str:
    """``text`` with everything spelled out that a terminal or a log reader could act upon."""
    shown = text.rstrip("\r").replace("\t", "    ")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in shown)


def bounded(fields: Mapping[str, Any], budget: int) -> tuple[dict[str, Any], int]:
    """``fields`` within about ``budget`` bytes, and how many they are: texts are shortened, what is too much is left out."""
    kept: dict[str, Any] = {}
    spent = 0
    for key, value in fields.items():
        part, size = _bounded(value, budget - spent)
        if size <= budget - spent:
            kept[key[:MAX_WORD_CHARS]] = part
            spent += size + len(key)
    return kept, spent


def _bounded(value: Any, budget: int) -> tuple[Any, int]:
    if isinstance(value, str):
        text = shortened(value)
        return text, len(text)
    if isinstance(value, Mapping):
        return bounded(value, budget)
    if not isinstance(value, list | tuple):
        return value, 8
    items: list[Any] = []
    spent = 0
    for item in value:
        part, size = _bounded(item, budget - spent)
        if spent + size > budget:
            break
        items.append(part)
        spent += size + 8
    return items, spent


def duration(seconds: float) -> str:
    """``850 ms``, ``4 s``, ``2 min``, ``24 h``: coarse on purpose."""
    if seconds < 1:
        return f"{round(seconds * 1000)} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def size(n_bytes: int) -> str:
    """``22.5 GiB``, ``350 MiB``, ``0``: three digits are enough to read."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= scale:
            value = n_bytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{n_bytes} B" if n_bytes else "0"


def parse_size(text: str) -> int:
    """``4GiB`` or ``512 MiB`` as bytes. Raises ValueError with the remedy."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text[:40]!r} is no size: it must be a number and B, KiB, MiB, GiB or TiB, such as 4GiB")
    return int(float(found[1]) * (1 << _UNITS[found[2].lower()]))


def count(number: int, noun: str) -> str:
    """``no leases``, ``one lease``, ``3 leases``."""
    words = {0: "no", 1: "one"}
    return f"{words.get(number, number)} {noun}{'' if number == 1 else 's'}"


def exit_phrase(code: int | None, signal_name: str | None) -> str:
    """How a process ended, as part of a sentence."""
    if signal_name:
        return f"died of {signal_name}"
    if code is None:
        return "is gone, and how it ended was lost"
    return f"exited with code {code}"


def starting(pool_id: str, origin: str) -> str:
    why = {
        "boot": "as configured",
        "demand": "on demand",
        "restart": "again",
        "another port": "on another port",
        "gpus": "now that there are GPUs",
    }.get(origin, "on request")
    return f"Starting pool '{pool_id}' {why}"


def backing_off(pool_id: str, what: str, delay_ms: int) -> str:
    return f"Engine of pool '{pool_id}' {what}; starting it again in {duration(delay_ms / 1000)}"


def breaker(pool_id: str, name: str, state: str, failures: int, left_s: float | None) -> str:
    """What became of one of a pool's breakers; ``left_s`` is the time for which it is open."""
    which = "CUDA breaker" if name == "cuda" else "Breaker"
    if state == "closed":
        return f"{which} of pool '{pool_id}' is closed"
    if state == "half_open":
        return f"{which} of pool '{pool_id}' lets one start through"
    after = f" after {count(failures, 'failure')}"
    return f"{which} of pool '{pool_id}' is open{after}; a start is tried in {duration(left_s or 0)}"


def cut_off(leases: int, why: str) -> str:
    """Why nothing runs: a drain cut requests off, with a lease or without one."""
    return f"{why}: {count(leases, 'request')} {'was' if leases == 1 else 'were'} cut off"


def giving_up(pool_id: str, what: str, why: str) -> str:
    return f"Engine of pool '{pool_id}' {what}; it stays down because {why}"


def draining(pool_id: str, leases: int, deadline_ms: int) -> str:
    if leases == 0:
        return f"Pool '{pool_id}' is draining; nothing is running on it"
    return f"Pool '{pool_id}' is draining; {count(leases, 'request')} may run on for {duration(deadline_ms / 1000)}"
