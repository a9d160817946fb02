"""The memory of a GPU as a picture: one bar of letters, and a legend with the exact sizes. Pure text."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pool_managerd.cli.output import plain
from pool_managerd.cli.table import cut

Row = Mapping[str, Any]

DRIVER, FREE, UNKNOWN = "=", ".", "?"
_POOLS, _FOREIGN = string.ascii_uppercase, string.digits[1:]
_MIB = 1 << 20
_INDENT = "  "


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the memory: ``symbol`` draws it, ``style`` colours it on a terminal."""

    symbol: str
    size_bytes: int
    style: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Stretches of text with their styles."""

    spans: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "".join(text for text, _ in self.spans).rstrip()


def draw(device: Row, driver_version: str | None, width: int) -> Iterator[Line]:
    """The header, the bar and the legend of one device, in lines of at most ``width`` columns where names allow."""
    yield header(device, driver_version, width)
    if device["state"] != "ok" and device["uuid"] != device["device"]:  # which card it is, whatever the others are called now
        slot = f" at {plain(device['pci_bus_id'])}" if device.get("pci_bus_id") else ""
        yield Line(((f"{_INDENT}{plain(device['uuid'])}{slot}", ""),))
    if device.get("reason"):
        yield Line(((f"{_INDENT}{plain(device['reason'])}", "red"),))
    if device.get("remedy"):
        yield Line(((f"{_INDENT}remedy: {plain(device['remedy'])}", ""),))
    if not device["vram_total_bytes"]:  # it is gone, or was never read
        return
    parts = list(parts_of(device))
    counts = cells([part.size_bytes for part in parts], width - len(_INDENT) - 2)
    bar = tuple((part.symbol * count, part.style) for part, count in zip(parts, counts, strict=True))
    yield Line(((f"{_INDENT}[", ""), *bar, ("]", "")))
    yield from legend(device)


def header(device: Row, driver_version: str | None, width: int) -> Line:
    """Index, name, state, temperature, power, utilization, driver; the name gives way when it is narrow."""
    whole = device.get("parent_uuid") is None
    title = f"GPU {plain(device['device'])}" if device["uuid"] != device["device"] else plain(device["device"])
    state = (
        str(device["state"]) + (", cordoned" if device.get("cordoned") else "") + (", MIG" if device.get("mig_enabled") else "")
    )
    watts, busy = device.get("power_watts"), device.get("utilization_percent")
    facts = [
        f"{device['temperature_c']} °C" if device.get("temperature_c") is not None else None,
        f"{watts:.0f} W" if watts is not None else None,
        f"{busy} % busy" if busy is not None else None,
        f"driver {plain(driver_version)}" if driver_version else None,
    ]
    if not whole:  # these figures are its parent's
        facts = [f"MIG of GPU {device['id']}"]
    tail = "".join(f"  {fact}" for fact in facts if fact)
    room = max(12, width - len(title) - len(state) - len(tail) - 4)
    style = "green" if device["state"] == "ok" and not device.get("cordoned") else "bold red"
    return Line(((title, "bold"), (f"  {cut(plain(device['name']), room)}  ", ""), (state, style), (tail, "")))


def parts_of(device: Row) -> Iterator[Part]:
    """What the memory consists of, left to right. Together they are at least the whole of it.

    Of a device that cannot be read only the reservations are known.
    """
    left = int(device["vram_total_bytes"])
    for letter, reservation in _named(device["reservations"], _POOLS):
        used = int(reservation["used_bytes"] or reservation.get("estimated_bytes") or 0)
        reserved = max(0, int(reservation["reserved_bytes"]) - used)
        yield Part(letter, used, _style(letter))
        yield Part(letter.lower(), reserved, _style(letter))
        left -= used + reserved
    if not _readable(device):
        yield Part(UNKNOWN, max(0, left), "dim")
        return
    for digit, process in _named(_foreign(device), _FOREIGN):
        yield Part(digit, int(process["vram_bytes"] or 0), "magenta")
    yield Part(UNKNOWN, _unknown_bytes(device), "magenta")
    driver = int(device.get("vram_driver_bytes") or 0)
    yield Part(DRIVER, driver, "dim")
    yield Part(FREE, max(0, left - max(int(device["foreign_bytes"]), 0) - driver), "dim")


def cells(sizes: Sequence[int], width: int) -> list[int]:
    """How many of ``width`` columns each size gets: in proportion, but one at least for what is there at all."""
    total = sum(sizes)
    if total <= 0 or width <= 0:
        return [0] * len(sizes)
    counts = [max(1, size * width // total) if size > 0 else 0 for size in sizes]

    def surplus(index: int) -> int:
        return counts[index] * total - sizes[index] * width

    while sum(counts) != width:
        step = 1 if sum(counts) < width else -1
        may = [i for i, size in enumerate(sizes) if size > 0 and counts[i] + step >= 1]
        if not may:
            break
        chosen = min(may, key=lambda i: step * surplus(i))  # furthest below its share grows, furthest above it shrinks
        counts[chosen] += step
    return counts


def legend(device: Row) -> Iterator[Line]:
    """One line for each part, with its size in MiB."""
    rows = list(_legend_rows(device))
    names = max(len(name) for _, name, _, _, _ in rows)
    sizes = max(len(size) for _, _, size, _, _ in rows)
    for symbol, name, size, note, style in rows:
        yield Line(((f"{_INDENT}{symbol}", style), (f"  {name:<{names}}  {size:>{sizes}} MiB  {note}".rstrip(), "")))


def _legend_rows(device: Row) -> Iterator[tuple[str, str, str, str, str]]:
    for letter, reservation in _named(device["reservations"], _POOLS):
        yield letter, f"pool {plain(reservation['pool_id'])}", *_reservation(reservation), _style(letter)
    total = _mib(device["vram_total_bytes"])
    if not _readable(device):
        yield UNKNOWN, "not known", "-", f"of {total} MiB: the device cannot be read", ""
        return
    for digit, process in _named(_foreign(device), _FOREIGN):
        name = f"{plain(process.get('name') or 'a process')} (pid {process['pid']})"
        note = "not ours" if process.get("certain", True) else "not ours; the pid is the driver's own number"
        note = "has ended, and its memory was not given back" if process.get("ended") else note
        yield digit, cut(name, 40), _mib(process["vram_bytes"]), note, "magenta"
    if (unknown := _unknown_bytes(device)) > 0:
        yield UNKNOWN, "others", _mib(unknown), "the driver does not say who", "magenta"
    if device.get("vram_driver_bytes"):
        yield DRIVER, "driver", _mib(device["vram_driver_bytes"]), "", ""
    kept = device.get("kept_for")
    rest = f"kept for pool {plain(kept)}" if kept else f"{_mib(device['vram_available_bytes'])} MiB not reserved"
    yield FREE, "free", _mib(device["vram_free_bytes"]), f"of {total} MiB; {rest}", ""


def _readable(device: Row) -> bool:
    return bool(device.get("readable", True))


def _foreign(device: Row) -> list[Row]:
    """Who else is there. Where pids cannot be matched, our engines are listed as well: what is not foreign is left out."""
    listed, left = [], int(device["foreign_bytes"])
    for process in sorted(device["foreign"], key=lambda process: not process.get("certain", True)):
        held = int(process["vram_bytes"] or 0)
        if process.get("certain", True) or held <= left:
            listed.append(process)
            left -= held
    return listed


def _unknown_bytes(device: Row) -> int:
    return max(0, int(device["foreign_bytes"]) - sum(int(process["vram_bytes"] or 0) for process in _foreign(device)))


def _reservation(reservation: Row) -> tuple[str, str]:
    """Size and note: what is used of what was reserved."""
    used, reserved = reservation["used_bytes"], int(reservation["reserved_bytes"])
    if (estimated := reservation.get("estimated_bytes")) is not None:
        note = f"estimated, of {_mib(reserved)} reserved; the driver does not say what it holds"
        return _mib(estimated), note
    unseen = "the driver does not say what is used" if reservation.get("pids") else "not seen in use"
    notes = [f"of {_mib(reserved)} reserved" if used is not None else f"reserved; {unseen}"]
    if used is not None and used > reserved:
        notes.append(f"{_mib(used - reserved)} MiB over")
    if reservation.get("exclusive"):
        notes.append("exclusive")
    if pids := reservation.get("pids"):
        notes.append("pid " + ", ".join(map(str, pids[:4])) + (", …" if len(pids) > 4 else ""))
    return _mib(reserved if used is None else used), "; ".join(notes)


def _named(rows: Sequence[Row], symbols: str) -> Iterator[tuple[str, Row]]:
    """Each row with its letter; beyond the last letter they share it."""
    for index, row in enumerate(rows):
        yield symbols[min(index, len(symbols) - 1)], row


def _style(letter: str) -> str:
    return ("green", "bold green")[_POOLS.index(letter) % 2]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / _MIB:,.0f}"
