"""Which models of the cache may go, in which order, and why each of the others stays (SPEC §6.8).

What somebody needs, what is pinned, and what was needed within the window never goes. Of the rest that which nobody has needed
for longest goes first, until the limits hold. How long that is counts the cache's own time, never the wall clock's: a clock
that jumps makes nothing old. Names that share a file stay or go together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pool_managerd.core.narration import size

DAY_S = 86_400
TEMPORARY_S = 3_600
"""So old is no file that somebody is just writing under another name."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in the cache. ``files`` are paths and bytes; ``idle_s`` is for how long nobody has needed it, ``needed_at`` when
    somebody did, in the cache's own time. ``users`` say who needs it now, each in a sentence.
    """

    ref: str
    files: tuple[tuple[str, int], ...]
    idle_s: float
    pinned: bool = False
    users: tuple[str, ...] = ()
    needed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Leftover:
    """Bytes in the cache that are no model: ``kind`` is download (a part of one), file (no note names it), temporary, or note
    (it cannot be read). ``idle_s`` is for how long it has been seen as it is; ``users`` as of a model.
    """

    path: str
    kind: str
    size_bytes: int
    idle_s: float
    users: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_bytes`` of the cache (None: as much as there is), ``keep_free_bytes`` of its disk.

    ``used_bytes`` and ``free_bytes`` are what is so now, ``need_bytes`` what is to come beside it.
    """

    used_bytes: int = 0
    free_bytes: int = 0
    max_bytes: int | None = None
    keep_free_bytes: int = 0
    need_bytes: int = 0

    @property
    def short_bytes(self) -> int:
        """How much must go until they hold; 0 where they do."""
        over = 0 if self.max_bytes is None else self.used_bytes + self.need_bytes - self.max_bytes
        return max(0, over, self.keep_free_bytes + self.need_bytes - self.free_bytes)


@dataclass(frozen=True, slots=True)
class Stock:
    """All that the cache below ``root`` has, with the limits as they are. Files of models are absolute paths, what is left over
    is below ``root``.
    """

    root: str = ""
    models: tuple[StoredModel, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Verdict:
    """``go`` or stay, and ``why``. ``frees_bytes`` counts what goes with it, at the place that it has in the order."""

    name: str
    kind: str
    size_bytes: int
    go: bool
    why: str
    frees_bytes: int = 0


def plan(
    models: Iterable[StoredModel], leftovers: Iterable[Leftover], keep_s: float, limits: Limits | None
) -> tuple[Verdict, ...]:
    """What goes, in order, and then what stays. Without ``limits`` all goes that nobody has needed for ``keep_s``; with them
    no more than has to. What is left over counts first: it is of no use to anybody.
    """
    left = [_of_leftover(one, keep_s) for one in sorted(leftovers, key=lambda one: (-one.idle_s, one.path))]
    freed = sum(one.frees_bytes for one in left)
    gone, kept = [one for one in left if one.go], [one for one in left if not one.go]
    together = sorted(_sharing(models), key=lambda unit: (-min(one.idle_s for one in unit), unit[0].ref))
    for unit in together:
        reasons = [_stays(one, keep_s) for one in unit]
        if any(reasons):
            kept += [_kept(one, why or _beside(unit, reasons)) for one, why in zip(unit, reasons, strict=True)]
        elif limits is not None and freed >= limits.short_bytes:
            kept += [_kept(one, "the limits hold without its going") for one in unit]
        else:
            gone += _gone(unit)
            freed += _bytes_of(unit)
    return (*gone, *sorted(kept, key=lambda one: (one.kind != "model", one.name)))


def may_go(verdicts: Iterable[Verdict]) -> int:
    """Bytes that what goes would free."""
    return sum(one.frees_bytes for one in verdicts if one.go)


def _stays(model: StoredModel, keep_s: float) -> str:
    if model.users:
        return "; ".join(model.users)
    if model.pinned:
        return "it is pinned"
    if model.idle_s < keep_s:
        return f"it was needed {ago(model.idle_s)}; it stays for {span(keep_s)}"
    return ""


def _beside(unit: Sequence[StoredModel], reasons: Sequence[str]) -> str:
    other = next(one.ref for one, why in zip(unit, reasons, strict=True) if why)
    return f"its files are those of {other}, too"


def _kept(model: StoredModel, why: str) -> Verdict:
    return Verdict(model.ref, "model", _bytes_of((model,)), go=False, why=why)


def _gone(unit: Sequence[StoredModel]) -> list[Verdict]:
    """The bytes of what they share are told with the last one that has it."""
    told = []
    for index, model in enumerate(unit):
        later = {path for other in unit[index + 1 :] for path, _ in other.files}
        frees = sum({path: count for path, count in model.files if path not in later}.values())
        why = f"nobody has needed it for {span(model.idle_s)}"
        told.append(Verdict(model.ref, "model", _bytes_of((model,)), go=True, why=why, frees_bytes=frees))
    return told


def _bytes_of(unit: Iterable[StoredModel]) -> int:
    return sum({path: count for model in unit for path, count in model.files}.values())


def _sharing(models: Iterable[StoredModel]) -> list[list[StoredModel]]:
    """Models by what they share: those that have a file in common, also by way of a third one, are together."""
    units: list[tuple[set[str], list[StoredModel]]] = []
    for model in sorted(models, key=lambda one: one.ref):
        paths, members = {path for path, _ in model.files}, [model]
        apart = []
        for unit in units:
            if unit[0] & paths:
                paths, members = unit[0] | paths, [*unit[1], *members]
            else:
                apart.append(unit)
        units = [*apart, (paths, members)]
    return [sorted(members, key=lambda one: one.ref) for _, members in units]


def _of_leftover(found: Leftover, keep_s: float) -> Verdict:
    why, go = "; ".join(found.users), False
    keep_s = min(keep_s, TEMPORARY_S) if found.kind == "temporary" else keep_s
    if not why and found.idle_s < keep_s:
        why = f"it has been so for {span(found.idle_s)}; it stays for {span(keep_s)}"
    if not why:
        why, go = _NOBODYS.get(found.kind, "nobody needs it"), True
    return Verdict(found.path, found.kind, found.size_bytes, go, why, found.size_bytes if go else 0)


_NOBODYS = {
    "download": "nobody goes on with this download", "file": "no model has it", "temporary": "it was left by a crash",
}  # fmt: skip


def span(seconds: float) -> str:
    """``7 days``, ``3 h``, ``5 min``: as coarse as such times are."""
    if seconds >= 2 * DAY_S:
        return f"{seconds / DAY_S:.0f} days"
    if seconds >= 7200:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def ago(seconds: float) -> str:
    return "just now" if seconds < 60 else f"{span(seconds)} ago"


def shortage(limits: Limits, what: str, where: str, could_go: str) -> tuple[str, str]:
    """What is said where ``what`` does not fit, and what can be done about it."""
    more = f"cannot fetch {what}: {size(limits.need_bytes)} more are needed, "
    if limits.max_bytes is not None and limits.used_bytes + limits.need_bytes > limits.max_bytes:
        return (
            f"{more}and {size(limits.used_bytes)} of the {size(limits.max_bytes)} that {where} may have are used"
            " (models.max_bytes)",
            could_go or "pin less, delete models (pool-managerd models rm), or raise models.max_bytes",
        )  # fmt: skip
    return (
        f"{more}{size(limits.free_bytes)} are free where {where} is, and {size(limits.keep_free_bytes)} stay free"
        " (models.keep_free_bytes)", could_go or "free some space there, or have models.cache_dir on a larger disk",
    )  # fmt: skip
