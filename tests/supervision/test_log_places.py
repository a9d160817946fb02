"""Where a log stood when: enough to answer how far back, in bounded memory."""

from __future__ import annotations

from pool_managerd.supervision.log_places import LogPlaces, place_of


def test_the_place_of_then_is_the_last_that_was_noted_before_it() -> None:
    places = LogPlaces()
    places.launched(1_000, (7, 0))
    places.seen(10_000, (7, 100))
    places.seen(20_000, (7, 200))
    assert places.since(500) is None, "nothing is known of before"
    assert [places.since(at) for at in (1_000, 9_999, 10_000, 99_000)] == [(7, 0), (7, 0), (7, 100), (7, 200)]


def test_a_place_is_noted_when_the_log_has_grown_and_not_at_every_probe() -> None:
    places = LogPlaces()
    places.launched(0, (7, 0))
    places.seen(1_000, (7, 50))
    assert places.since(99_000) == (7, 0), "too soon"
    places.seen(6_000, (7, 60))
    places.seen(12_000, (7, 60))
    assert places.since(99_000) == (7, 60) and places.since(5_999) == (7, 0)


def test_the_launch_before_the_last_one_lies_between_two_places() -> None:
    places = LogPlaces()
    assert places.previous() is None
    places.launched(0, (7, 0))
    assert places.previous() is None, "one launch has none before it"
    places.launched(9_000, (7, 300))
    assert places.previous() == ((7, 0), (7, 300))
    places.launched(19_000, (8, 10))
    assert places.previous() == ((7, 300), (8, 10))


def test_a_long_life_costs_no_more_memory_and_keeps_its_first_and_newest_places() -> None:
    places = LogPlaces()
    for number in range(10_000):
        places.seen(number * 5_000, (7, number))
    assert len(places._seen) <= 64
    assert places.since(0) == (7, 0)
    newest = 9_999 * 5_000
    assert [places.since(newest - ago * 5_000) for ago in range(5)] == [(7, 9_999 - ago) for ago in range(5)]


def test_a_log_that_is_not_there_yet_is_nowhere() -> None:
    assert place_of({}) == (0, 0)
    assert place_of({9: 5, 3: 100}) == (9, 5), "the present part comes first"
