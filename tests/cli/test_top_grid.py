"""Cells in a width, lists in a height."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.cli.output import plain
from pool_managerd.cli.picture import Line
from pool_managerd.cli.table import Column, width
from pool_managerd.cli.top_grid import Cell, fitted, grid, shares, shortened, texts

WORDS = st.text().map(plain)


@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), max_size=5), st.integers(1, 60))
def test_no_line_is_wider_than_asked_for(rows: list[list[str]], room: int) -> None:
    columns = [Column("", 0, least=4, middle=True), Column("", 2), Column("", 1, least=6)]
    lines = grid(columns, [texts(row, right=frozenset({1})) for row in rows], room)
    assert len(lines) == len(rows) and all(width(str(line)) <= room for line in lines)


@given(st.lists(st.tuples(WORDS, st.sampled_from(["", "bold"])), max_size=5), st.integers(1, 60))
def test_a_line_is_cut_where_it_is_too_wide(spans: list[tuple[str, str]], room: int) -> None:
    line = Line(tuple(spans))
    assert width(str(fitted(line, room))) <= room
    if width(str(line)) <= room:
        assert fitted(line, room) is line


def test_columns_without_a_word_take_no_room() -> None:
    rows = [texts(["a", "", "b"]), [Cell("c"), Cell(), Cell("d", right=True)]]
    assert [str(line) for line in grid([Column("", 0)] * 3, rows, 20)] == ["a b", "c d"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=5), st.integers(0, 60))
def test_lists_share_the_room_and_leave_none_that_is_wanted(lists: list[tuple[int, int]], room: int) -> None:
    wants = [want for want, _ in lists]
    given_ = shares(wants, [least for _, least in lists], room)
    assert sum(given_) == min(room, sum(wants)) and all(got <= want for got, want in zip(given_, wants, strict=True))


def test_those_in_front_have_their_least_first() -> None:
    assert shares([20, 20], [3, 2], 4) == [3, 1]
    assert shares([20, 4], [3, 2], 12) == [8, 4]


def test_rows_that_do_not_fit_are_counted() -> None:
    lines = [Line(((str(number), ""),)) for number in range(6)]
    assert [str(line) for line in shortened(lines, 4, 1, "pool")] == ["0", "1", "2", "… and 3 more pools"]
    assert [str(line) for line in shortened(lines[:3], 2, 1, "pool")] == ["0", "… and 2 more pools"]
    assert shortened(lines, 6, 1, "pool") == lines and len(shortened(lines, 1, 1, "pool")) == 1
