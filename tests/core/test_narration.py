"""Sentences and texts: what is kept of them, and how figures read."""

from __future__ import annotations

import pytest

from pool_managerd.core import narration


def test_a_long_word_loses_its_middle_and_a_long_text_its_end() -> None:
    assert narration.shortened("x" * 199 + " y") == "x" * 199 + " y"
    word = narration.shortened("say " + "a" * 150 + "b" * 150)
    assert word == f"say {'a' * 120}…{'b' * 60}"
    text = narration.shortened("word " * 500)
    assert len(text) == narration.MAX_TEXT_CHARS and text.endswith("…")
    assert narration.shortened("w " * 1000) == "w " * 1000, "2,000 characters are kept"


def test_what_a_terminal_would_act_upon_is_spelled_out() -> None:
    assert narration.printable("a\tb\x1b[31m\u202e\r") == "a    b\\x1b[31m\\u202e"


def test_fields_are_kept_until_the_budget_is_spent() -> None:
    assert narration.bounded({"a": "12345", "n": 5}, 15) == ({"a": "12345", "n": 5}, 15)
    assert narration.bounded({"a": "12345", "n": 5}, 14) == ({"a": "12345", "n": 5}, 15), "the name of the last one is not asked"
    assert narration.bounded({"a": "12345", "n": 5}, 13) == ({"a": "12345"}, 6)
    assert narration.bounded({"k" * 300: 1}, 100)[0] == {"k" * 200: 1}
    assert narration.bounded({"big": "x" * 50, "small": "y"}, 20)[0] == {"small": "y"}


def test_what_stands_inside_a_field_is_bounded_like_it() -> None:
    assert narration.bounded({"m": {"x": "abc"}, "l": ["ab", "cd"]}, 100)[0] == {"m": {"x": "abc"}, "l": ["ab", "cd"]}
    assert narration.bounded({"l": ("ab", "cd", "ef")}, 21) == ({"l": ["ab", "cd"]}, 21), "each item counts eight more"
    assert narration.bounded({"t": "z" * 400}, 400)[0] == {"t": "z" * 120 + "…" + "z" * 60}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0 ms"), (0.85, "850 ms"), (0.9994, "999 ms"), (1, "1 s"), (119.9, "120 s"), (120, "2 min"), (180, "3 min")],
)  # fmt: skip
def test_durations_read_well(seconds: float, text: str) -> None:
    assert narration.duration(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1 << 20, "1 MiB"), (1 << 30, "1 GiB"), (350 << 20, "350 MiB"),
     (int(22.54 * (1 << 30)), "22.5 GiB"), (100 << 30, "100 GiB"), (2000 << 30, "2000 GiB")],
)  # fmt: skip
def test_sizes_read_with_three_digits(n_bytes: int, text: str) -> None:
    assert narration.size(n_bytes) == text


def test_counts_read_as_words_where_they_are_small() -> None:
    assert [narration.count(n, "lease") for n in range(3)] == ["no leases", "one lease", "2 leases"]


def test_an_end_is_told_by_its_signal_before_its_code() -> None:
    assert narration.exit_phrase(1, "SIGKILL") == "died of SIGKILL"
    assert narration.exit_phrase(0, None) == "exited with code 0"
    assert narration.exit_phrase(None, None) == "is gone, and how it ended was lost"


@pytest.mark.parametrize(
    ("origin", "why"),
    [("boot", "as configured"), ("demand", "on demand"), ("restart", "again"), ("another port", "on another port"),
     ("gpus", "now that there are GPUs"), ("request", "on request")],
)  # fmt: skip
def test_a_start_says_who_wanted_it(origin: str, why: str) -> None:
    assert narration.starting("chat", origin) == f"Starting pool 'chat' {why}"


def test_what_becomes_of_a_breaker_is_a_sentence() -> None:
    assert narration.breaker("p", "cuda", "closed", 5, None) == "CUDA breaker of pool 'p' is closed"
    assert narration.breaker("p", "general", "half_open", 5, None) == "Breaker of pool 'p' lets one start through"
    told = narration.breaker("p", "general", "open", 5, 300.0)
    assert told == "Breaker of pool 'p' is open after 5 failures; a start is tried in 5 min"


def test_a_drain_says_what_it_waits_for_and_what_it_cut_off() -> None:
    assert narration.draining("p", 0, 5000) == "Pool 'p' is draining; nothing is running on it"
    assert narration.draining("p", 1, 5000) == "Pool 'p' is draining; one request may run on for 5 s"
    assert narration.cut_off(1, "deadline") == "deadline: one request was cut off"
    assert narration.cut_off(2, "deadline") == "deadline: 2 requests were cut off"


def test_waits_and_ends_of_an_engine_are_sentences() -> None:
    assert narration.backing_off("p", "failed", 1500) == "Engine of pool 'p' failed; starting it again in 1.5 s"
    assert narration.giving_up("p", "failed", "of that") == "Engine of pool 'p' failed; it stays down because of that"


@pytest.mark.parametrize(("text", "size"), [("4GiB", 4 << 30), ("1.5 MiB", 3 << 19), ("7 b", 7), ("2tib", 2 << 40)])
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert narration.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "4GB", "GiB", "-1GiB", "1e3GiB", "٤GiB", "9" * 40 + "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        narration.parse_size(text)
