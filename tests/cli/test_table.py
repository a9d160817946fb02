"""Tables: what stands in them at every width, and that nothing is cut without a mark."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.cli.output import printable
from pool_managerd.cli.table import Column, cut, width, widths
from tests.cli.test_commands import Invoke, Server

LONG = "a-pool-with-an-identifier-of-sixty-three-letters-for-the-night-1"[:63]
Screen = Callable[..., list[str]]


@pytest.fixture
def screen(invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch) -> Screen:
    """The lines of a command on a terminal of so many columns."""
    server.node.add(
        "broken",
        state="failed",
        ready=False,
        live=False,
        url=None,
        restart_count=12,
        last_error="cannot use the \x1b[31mmodel\x1b[0m: 模型文件\n坏了 and a long tail " + "of words " * 30,
    )
    server.node.add(
        LONG, state="uninitialized", live=False, ready=False, url=None, model_id="file:/srv/models/深い/m-Q4_K_M.gguf"
    )
    server.node.add("hung", ready=False, last_error="health check failed: no answer")

    def show(columns: int, *command: str, colour: bool = True) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", "" if colour else "1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return invoke(*command)[1].splitlines()

    return show


def bare(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


@pytest.mark.parametrize("columns", [80, 100, 120, 140])
def test_what_matters_of_a_pool_is_there_from_80_columns_on(screen: Screen, columns: int) -> None:
    head, *rows = bare(screen(columns, "pools"))
    assert head.split("  ") and all(
        name in head for name in ("ID", "STATE", "READY", "LEASES", "RESTARTS", "MODEL", "URL", "ERROR")
    )
    assert max(map(width, [head, *rows])) <= columns
    text = "\n".join(rows)
    for word in ("uninitialized", "http://127.0.0.1:8080", "0/2", "12", "tiny", "cannot use the"):
        assert word in text, word
    below = rows[next(i for i, row in enumerate(rows) if row.startswith("hung")) + 1]
    assert below.strip().startswith("health check failed"), "a pool that has both shows both"


def test_a_reload_under_way_is_seen_in_80_columns_and_so_is_the_second_engine(screen: Screen, server: Server) -> None:
    other = {"replica_id": "r1", "role": "candidate", "state": "starting", "epoch": 2, "active_leases": 0, "pid": 77, "url": None}
    server.node.pools["demo"] |= {"reload": "loading", "beside": other}
    rows = bare(screen(80, "pools"))
    at = next(i for i, row in enumerate(rows) if row.startswith("demo"))
    assert max(map(width, rows)) <= 80
    assert rows[at].split()[:2] == ["demo", "ready"]
    assert rows[at + 1].strip().startswith("reload: loading") and rows[at + 1].endswith("candidate: starting")
    wide = "\n".join(bare(screen(80, "pools", "-o", "wide")))
    assert "reload: loading" in wide and "candidate r1, starting, pid 77" in wide


def test_nothing_is_cut_without_a_mark(screen: Screen) -> None:
    rows = bare(screen(80, "pools"))
    assert "…" in next(row for row in rows if row.startswith("broken"))
    name = next(row for row in rows if row.startswith("a-")).split()[0]
    start, _, end = name.partition("…")
    assert LONG.startswith(start) and LONG.endswith(end) and end, "the end of an id tells it from its neighbours"


def test_a_terminal_that_is_too_narrow_loses_columns_by_rank_and_keeps_the_id(screen: Screen) -> None:
    head = bare(screen(40, "pools"))[0]
    assert head.split()[:2] == ["ID", "STATE"] and "RESTARTS" not in head
    assert max(map(width, bare(screen(20, "pools")))) <= 20


def test_wide_and_a_pipe_show_all_of_it(screen: Screen, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal = bare(screen(80, "pools", "-o", "wide"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    for lines in (on_terminal, invoke("pools")[1].splitlines()):
        assert LONG in "\n".join(lines) and "of words " * 29 in "\n".join(lines) and "4242" in "\n".join(lines)
        assert not any("…" in line or "\x1b" in line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in lines[1:2])


def test_no_control_character_of_an_error_reaches_the_terminal(screen: Screen) -> None:
    for command in (("pools",), ("pools", "-o", "wide"), ("status",)):
        assert all(line == printable(line) for line in bare(screen(120, *command)))


def test_colours_are_those_that_can_be_read_on_dark_and_light(screen: Screen) -> None:
    found = set(re.findall(r"\x1b\[([0-9;]*)m", "\n".join(screen(120, "pools"))))
    assert found == {"0", "1", "31", "32"}
    assert "\x1b" not in "\n".join(screen(120, "pools", colour=False))


def test_a_list_of_facts_is_wrapped_between_words(screen: Screen) -> None:
    lines = bare(screen(80, "status", "broken"))
    at = next(i for i, line in enumerate(lines) if line.startswith("last error"))
    assert all(width(line) <= 80 for line in lines[at:]) and lines[at + 1].startswith(" " * 12)


WORDS = st.text(st.sampled_from("aß模é漢́x… -🙂"), max_size=30)


@given(WORDS, st.integers(1, 20), st.booleans())
def test_a_cut_text_fits_and_says_that_it_was_cut(text: str, room: int, middle: bool) -> None:
    shown = cut(text, room, middle=middle)
    assert width(shown) <= room
    assert shown == text or "…" in shown


@given(
    st.lists(st.tuples(st.integers(1, 80), st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=9), st.integers(20, 200)
)
def test_columns_fit_or_one_is_left(sizes: list[tuple[int, int, int]], room: int) -> None:
    columns = [Column("", rank, least) for _, rank, least in sizes]
    found = widths(columns, [size for size, _, _ in sizes], room)
    assert found and sum(found.values()) + 2 * (len(found) - 1) <= room
    assert min(column.rank for column in columns) == min(columns[i].rank for i in found), "the first of them is never lost"
