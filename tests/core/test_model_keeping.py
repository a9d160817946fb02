"""Which models go: never what is needed or pinned, what was left for longest first, and no more than the limits ask for."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.model_keeping import DAY_S, Leftover, Limits, StoredModel, Verdict, may_go, plan, shortage

WEEK_S = 7 * DAY_S
FILES = tuple((f"/cache/{name}.gguf", size) for name, size in (("a", 10), ("b", 200), ("c", 3000), ("d", 40_000), ("e", 7)))


def model(ref: str, idle_days: float, *, files: str = "", **more: object) -> StoredModel:
    known = dict(FILES)
    paths = tuple((f"/cache/{name}.gguf", known[f"/cache/{name}.gguf"]) for name in files or ref)
    return StoredModel(ref, paths, idle_days * DAY_S, **more)  # type: ignore[arg-type]


def gone(verdicts: tuple[Verdict, ...]) -> list[str]:
    return [one.name for one in verdicts if one.go]


def why(verdicts: tuple[Verdict, ...], name: str) -> str:
    return next(one.why for one in verdicts if one.name == name)


def test_each_that_stays_has_its_reason() -> None:
    found = plan(
        [model("a", 30, users=("pool chat is configured with it",)), model("b", 30, pinned=True), model("c", 2), model("d", 9)],
        [], WEEK_S, None,
    )  # fmt: skip
    assert gone(found) == ["d"] and why(found, "d") == "nobody has needed it for 9 days"
    assert why(found, "a") == "pool chat is configured with it" and why(found, "b") == "it is pinned"
    assert why(found, "c") == "it was needed 2 days ago; it stays for 7 days"


def test_what_was_left_for_longest_goes_first_and_no_more_than_has_to() -> None:
    models = [model("a", 9), model("b", 30), model("c", 20)]
    assert gone(plan(models, [], WEEK_S, None)) == ["b", "c", "a"]
    found = plan(models, [], WEEK_S, Limits(used_bytes=3210, max_bytes=3100, free_bytes=1 << 40))
    assert gone(found) == ["b"] and why(found, "c") == "the limits hold without its going" and may_go(found) == 200
    assert gone(plan(models, [], WEEK_S, Limits(used_bytes=3210, max_bytes=3100, free_bytes=1 << 40, need_bytes=91))) == [
        "b",
        "c",
    ]
    assert gone(plan(models, [], WEEK_S, Limits(free_bytes=100, keep_free_bytes=50))) == []


def test_names_that_share_a_file_go_together_or_stay_together() -> None:
    found = plan(
        [model("x", 30, files="a"), model("y", 30, files="ab", pinned=True), model("z", 30, files="b")], [], WEEK_S, None
    )
    assert gone(found) == [] and why(found, "x") == why(found, "z") == "its files are those of y, too"
    found = plan([model("x", 30, files="a"), model("y", 10, files="ab")], [], WEEK_S, None)
    assert gone(found) == ["x", "y"] and [one.frees_bytes for one in found] == [0, 210]


def test_what_is_left_over_goes_by_its_age_and_counts_before_models() -> None:
    left = [
        Leftover("partial/1.part", "download", 50, 8 * DAY_S), Leftover("partial/2.part", "download", 50, DAY_S),
        Leftover("partial/3.part", "download", 50, 8 * DAY_S, ("it is being fetched",)),
        Leftover("refs/x.9.new", "temporary", 1, 7200), Leftover("refs/y.9.new", "temporary", 1, 60),
    ]  # fmt: skip
    found = plan([model("a", 30)], left, WEEK_S, Limits(used_bytes=160, max_bytes=150, free_bytes=1 << 40))
    assert gone(found) == ["partial/1.part", "refs/x.9.new"], "with these the limit holds: the model stays"
    assert "stays for 7 days" in why(found, "partial/2.part") and why(found, "partial/3.part") == "it is being fetched"


def test_a_download_that_does_not_fit_is_told_which_limit_and_what_could_go() -> None:
    message, hint = shortage(Limits(900, 1 << 40, 1000, 0, 200), "hf:org/repo:Q8_0", "/cache", "")
    assert "models.max_bytes" in message and "200 B more" in message and "models rm" in hint
    message, hint = shortage(Limits(0, 100, None, 50, 200), "hf:org/repo:Q8_0", "/cache", "models gc would free 1 GiB")
    assert "models.keep_free_bytes" in message and hint == "models gc would free 1 GiB"


models_ = st.lists(
    st.builds(
        StoredModel,
        st.sampled_from("abcdefghij"), st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True).map(tuple),
        st.integers(0, 30).map(lambda days: float(days * DAY_S)), st.booleans(), st.sampled_from([(), ("pool p runs it",)]),
    ),
    unique_by=lambda one: one.ref, max_size=8,
)  # fmt: skip
limits_ = st.none() | st.builds(
    Limits, st.integers(0, 50_000), st.integers(0, 50_000), st.none() | st.integers(0, 50_000), st.integers(0, 50_000),
    st.integers(0, 50_000),
)  # fmt: skip


@given(models_, limits_)
def test_nothing_goes_that_somebody_needs_and_everything_is_told(models: list[StoredModel], limits: Limits | None) -> None:
    found, by_ref = plan(models, [], WEEK_S, limits), {one.ref: one for one in models}
    assert sorted(one.name for one in found) == sorted(by_ref) and all(one.why for one in found)
    kept_files = {path for one in found if not one.go for path, _ in by_ref[one.name].files}
    for ref in gone(found):
        one = by_ref[ref]
        assert not one.users and not one.pinned and one.idle_s >= WEEK_S
        assert not kept_files & {path for path, _ in one.files}, "no file goes that one has which stays"
    freed = dict(file for ref in gone(found) for file in by_ref[ref].files)
    assert may_go(found) == sum(freed.values()), "each file counts once"


@given(models_, limits_)
def test_it_goes_in_the_order_of_need_and_ends_where_the_limits_hold(models: list[StoredModel], limits: Limits | None) -> None:
    alone = [replace(one, files=((f"/cache/{one.ref}", one.files[0][1]),)) for one in models]
    found, idle = plan(alone, [], WEEK_S, limits), {one.ref: one.idle_s for one in alone}
    ages = [idle[ref] for ref in gone(found)]
    assert ages == sorted(ages, reverse=True)
    could_go = [one for one in alone if not one.users and not one.pinned and one.idle_s >= WEEK_S]
    left = [one.idle_s for one in could_go if one.ref not in gone(found)]
    assert not left or not ages or max(left) <= min(ages), "what stays was needed later than all that goes"
    if limits is None:
        assert not left
    elif gone(found):
        last = next(one.frees_bytes for one in reversed(found) if one.go)
        assert may_go(found) - last < limits.short_bytes, "the last one had to go, too"
        assert not left or may_go(found) >= limits.short_bytes, "nothing that may go stays while a limit does not hold"


@given(models_, limits_)
def test_a_second_run_finds_the_same_and_after_a_first_one_nothing(models: list[StoredModel], limits: Limits | None) -> None:
    found = plan(models, [], WEEK_S, limits)
    assert found == plan(reversed(models), [], WEEK_S, limits)
    if limits is not None:
        freed = may_go(found)
        limits = replace(limits, used_bytes=limits.used_bytes - freed, free_bytes=limits.free_bytes + freed)
    left = [one for one in models if one.ref not in gone(found)]
    assert gone(plan(left, [], WEEK_S, limits)) == []
