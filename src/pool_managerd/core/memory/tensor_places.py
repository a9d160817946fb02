"""Which weights a launch keeps in RAM by llama.cpp's rules on tensor names (`--cpu-moe`, `--n-cpu-moe`, `--override-tensor`).

The rules are regular expressions from a command line, searched for in each tensor's name; the first that matches decides.
Only such are read that take little time whatever they are searched in; of others nothing is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""What `--cpu-moe` moves; `--n-cpu-moe` the same of the first layers."""

MAX_PATTERN_CHARS, MAX_UNBOUNDED, MAX_NAME_CHARS = 512, 2, 128

_QUANTIFIED_GROUP = re.compile(r"\)[*+?{]|\(\?[^:]|\\[1-9]")
_UNBOUNDED = re.compile(r"[*+]|\{")
_LAYER = re.compile(r"blk\.(\d{1,4})\.")


@dataclass(frozen=True, slots=True)
class PlaceRule:
    """Tensors whose name matches ``pattern`` are kept in RAM, or (not ``in_ram``) wherever the rule says instead."""

    pattern: str
    in_ram: bool = True


def first_layers(count: int) -> tuple[PlaceRule, ...]:
    """`--n-cpu-moe COUNT` as rules: one, for all layers from 0."""
    if count < 1:
        return ()
    numbers = "|".join(str(number) for number in range(min(count, 999)))
    return (PlaceRule(rf"blk\.(?:{numbers}){EXPERTS}"),)


def readable(pattern: str) -> bool:
    """True for a pattern that can be applied: no group is repeated, and little else without bound."""
    if len(pattern) > MAX_PATTERN_CHARS or _QUANTIFIED_GROUP.search(pattern) or len(_UNBOUNDED.findall(pattern)) > MAX_UNBOUNDED:
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def bytes_in_ram(tensors: Iterable[tuple[str, int]], rules: Sequence[PlaceRule]) -> dict[int | None, int]:
    """Bytes that ``rules`` keep in RAM by the layer they belong to; None for those of no layer."""
    compiled = [(re.compile(rule.pattern), rule.in_ram) for rule in rules]
    found: dict[int | None, int] = {}
    for name, size_bytes in tensors if compiled else ():
        in_ram = next((ram for pattern, ram in compiled if pattern.search(name[:MAX_NAME_CHARS])), False)
        if in_ram:
            layer = layer_of(name)
            found[layer] = found.get(layer, 0) + size_bytes
    return found


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its name."""
    told = _LAYER.match(name)
    return int(told[1]) if told else None
