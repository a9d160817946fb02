"""The picture of a snapshot: lines that are never wider, and never more, than asked for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pool_managerd.cli.output import as_typed, moment, plain, span
from pool_managerd.cli.picture import DRIVER, FREE, UNKNOWN, Line, cells
from pool_managerd.cli.table import Column, cut, state_style
from pool_managerd.cli.top_grid import Cell, fitted, grid, shares, shortened, texts
from pool_managerd.cli.top_snapshot import (
    GpuRow,
    PoolRow,
    Snapshot,
    gpu_rows,
    pool_rows,
    recent_error,
    totals,
    waiting_rows,
)

_GIB = 1 << 30
_NONE = "-"
_POOLS, _KEPT, _OTHERS = "#", "+", "x"
_LEGEND = f"{_POOLS} pools  {_OTHERS} others  {_KEPT} kept  {FREE} free"
_BAR_MOST, _DETAIL_MOST = 60, 60
_HEAD = (
    Column("", 0), Column("", 7), Column("", 1), Column("", 2), Column("", 3), Column("", 4), Column("", 9, least=12),
)  # fmt: skip
_GPU = (
    Column("GPU", 0, least=5, middle=True), Column("MEMORY", 1, least=8), Column("USED", 2), Column("BUSY", 4),
    Column("TEMP", 5), Column("STATE", 3, least=8),
)  # fmt: skip
_POOL = (
    Column("POOL", 0, least=7, middle=True), Column("STATE", 1, least=9), Column("SLOTS", 2), Column("WAIT", 3),
    Column("REQ/S", 5), Column("TOK/S", 4), Column("FIRST", 6), Column("VRAM", 7), Column("IDLE", 8),
)  # fmt: skip
_TICKET = (Column("WAITING", 0, least=7, middle=True), Column("PLACE", 2), Column("SINCE", 1), Column("FOR", 3, least=10))
_NUMBERS = frozenset(range(2, 9))


def lines(shot: Snapshot, width: int, height: int | None = None) -> list[Line]:
    """The whole picture. ``height`` None: all rows, however many."""
    head = [_head(shot, width), *_notes(shot)]
    parts: list[tuple[Sequence[Line], int, str]] = [
        (_pools(shot, width), 1, "pool"), (_gpus(shot, width), 1, "GPU"), (_queue(shot, width), 1, "request"),
        (_error(shot), 0, "error"),
    ]  # fmt: skip
    wants = [len(part) for part, _, _ in parts]
    room = sum(wants) if height is None else max(0, height - len(head))
    given = shares(wants, [3, 2, 2, 1], room)
    gap = [Line(())] if height is None or sum(given) + sum(map(bool, given)) <= room else []
    drawn = [shortened(part, size, heads, what) for (part, heads, what), size in zip(parts, given, strict=True)]
    pools, gpus, queue, error = drawn
    found = [*head, *(line for part in (gpus, pools, queue, error) if part for line in (*gap, *part))]
    return [fitted(line, width) for line in found[:height]]


def _head(shot: Snapshot, width: int) -> Line:
    of, version = totals(shot), shot.node.version
    facts = [
        Cell(_clock(shot.at_ms), "bold"),
        Cell(f"pool-managerd {plain(version)}" if version else "pool-managerd"),
        Cell(f" {of['pools_ready']}/{of['pools']} pools ready"),
        Cell(f" {of['in_flight']} in flight"),
        Cell(f" {of['waiting']} waiting"),
        Cell(f" {_NONE if of['tokens_per_s'] is None else _number(of['tokens_per_s'])} tok/s"),
        Cell(f" {plain(shot.url)}"),
    ]
    return grid(_HEAD, [facts], width)[0]


def _notes(shot: Snapshot) -> list[Line]:
    """What must be known before the rest is believed."""
    found: list[tuple[str, str]] = []
    if shot.away is not None:
        found.append((f"away since {_clock(shot.away[0])}: {shot.away[1]}", "bold red"))
    if shot.node.status != "ok":
        found.append((f"{shot.node.status}: the state cannot be written, changes are refused", "bold red"))
    if shot.gateway.problem is not None:
        found.append((f"no rates: {shot.gateway.problem}", ""))
    devices = shot.node.devices
    if devices.get("stale") and devices.get("devices"):
        found.append((f"the GPUs cannot be read: {(devices.get('problem') or {}).get('message')}", "bold red"))
    return [Line(((plain(as_typed(text)), style),)) for text, style in found]


# --- memory ---


def _gpus(shot: Snapshot, width: int) -> list[Line]:
    """GPUs, or the RAM where there is none."""
    rows = gpu_rows(shot)
    if not rows:
        return _ram(shot, width)
    title = "SIMULATED" if shot.node.devices.get("simulated") else "STATE"
    head = [*texts(("GPU", _LEGEND, "USED", "BUSY", "TEMP", title), "bold", right=frozenset({2, 3, 4}))]
    head[1] = Cell(draw=lambda room: ((f"{cut(_LEGEND, room):<{room}}", "bold"),), wants=len(_LEGEND))
    return grid(_GPU, [head, *(_gpu(row, shot.at_ms) for row in rows)], width)


def _gpu(row: GpuRow, at_ms: int) -> list[Cell]:
    sizes = (
        (_POOLS, row.pools_bytes, "green"), (_OTHERS, row.others_bytes, "magenta"), (DRIVER, row.driver_bytes, ""),
        (_KEPT, row.kept_bytes, ""), (FREE, row.free_bytes, ""), (UNKNOWN, row.unknown_bytes, ""),
    )  # fmt: skip
    used = row.pools_bytes + row.others_bytes + row.driver_bytes
    known = row.total_bytes and not row.unknown_bytes
    words = _words(row, at_ms)
    return [
        Cell(f"GPU {plain(row.device)}" if len(row.device) < 8 else plain(row.device), "bold"),
        _bar(sizes) if row.total_bytes else Cell(),
        Cell(f"{used / _GIB:.1f}/{_gib(row.total_bytes)}" if known else _NONE, right=True),
        Cell(_NONE if row.utilization_percent is None else f"{row.utilization_percent} %", right=True),
        Cell(_NONE if row.temperature_c is None else f"{row.temperature_c} °C", right=True),
        Cell(words, "" if words == "ok" else "bold red" if row.state != "ok" or row.cordoned else "bold"),
    ]


def _words(row: GpuRow, at_ms: int) -> str:
    """``yielded until 14:00``, ``quarantined``, ``ok, cordoned``."""
    if row.yielded:
        until = "" if row.yielded_until_ms is None else f" until {_until(row.yielded_until_ms, at_ms)}"
        return f"yielded{until}" if row.state == "ok" else f"{plain(row.state)}, yielded{until}"
    return "cordoned" if row.cordoned and row.state == "ok" else plain(row.state) + (", cordoned" if row.cordoned else "")


def _ram(shot: Snapshot, width: int) -> list[Line]:
    total, free = shot.node.devices.get("ram_total_bytes"), shot.node.devices.get("ram_available_bytes")
    if not total or free is None:
        return []
    sizes = ((_POOLS, total - free, ""), (FREE, free, ""))
    row = [Cell("RAM", "bold"), _bar(sizes), Cell(f"{(total - free) / _GIB:.1f}/{_gib(total)} used", right=True)]
    return grid(_GPU[:3], [row], width)


def _bar(sizes: Sequence[tuple[str, int, str]]) -> Cell:
    def draw(room: int) -> Sequence[tuple[str, str]]:
        counts = cells([size for _, size, _ in sizes], room - 2)
        drawn = [(symbol * count, style) for (symbol, _, style), count in zip(sizes, counts, strict=True)]
        rest = " " * (room - 2 - sum(counts))
        return [("[", ""), *drawn, (f"]{rest}", "")] if sum(counts) <= room - 2 else [(" " * room, "")]

    return Cell(draw=draw, wants=_BAR_MOST)


# --- pools and requests ---


def _pools(shot: Snapshot, width: int) -> list[Line]:
    rows = pool_rows(shot)
    if not rows:
        return [Line((("no pools", ""),))]
    head = texts([column.head for column in _POOL], "bold", right=_NUMBERS)
    return grid(_POOL, [head, *map(_pool, rows)], width)


def _pool(row: PoolRow) -> list[Cell]:
    slots = str(row.slots_used) if row.slots_total is None else f"{row.slots_used}/{row.slots_total}"
    detail = "" if row.detail is None else f": {cut(plain(row.detail), _DETAIL_MOST)}"
    numbers = (
        slots, str(row.waiting), _or_none(row.requests_per_s, _number),
        _or_none(row.tokens_per_s, _number), _or_none(row.first_token_ms, _first), _or_none(row.vram_bytes, _gib),
        _or_none(row.idle_ms, span),
    )  # fmt: skip
    style = {"32": "green", "31": "red"}.get(state_style(row.state), "")
    return [
        Cell(plain(row.pool_id), "bold" if row.busy else ""), Cell(f"{plain(row.state)}{detail}", style),
        *(Cell(number, right=True) for number in numbers),
    ]  # fmt: skip


def _queue(shot: Snapshot, width: int) -> list[Line]:
    rows = [
        texts(
            (plain(one.get("pool_id")), plain(one.get("place")), span(one.get("waited_ms") or 0), plain(one.get("waits_for"))),
            right=frozenset({1, 2}),
        )
        for one in waiting_rows(shot)
    ]
    head = texts([column.head for column in _TICKET], "bold", right=frozenset({1, 2}))
    return grid(_TICKET, [head, *rows], width) if rows else []


def _error(shot: Snapshot) -> list[Line]:
    event = recent_error(shot)
    if event is None:
        return []
    pool, human = event.get("pool_id"), str(event.get("human"))
    said = human if not pool or str(pool) in human else f"{pool}: {human}"
    return [
        Line(((f"{_clock(event.get('ts_ms'))} {plain(event.get('level'))} ", "bold red"), (" ".join(plain(said).split()), "")))
    ]


# --- values ---


def _or_none(value: Any, shown: Callable[[Any], str]) -> str:
    return _NONE if value is None else shown(value)


def _number(value: float) -> str:
    """Two digits are enough to see a change."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _first(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 10_000 else span(round(ms))


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _clock(ts_ms: object) -> str:
    return str(moment(ts_ms))[-8:]


def _until(ts_ms: int, at_ms: int) -> str:
    """Of another day the date is enough."""
    until, now = str(moment(ts_ms)), str(moment(at_ms))
    return until[11:16] if until[:10] == now[:10] else until[5:10]
