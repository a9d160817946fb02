"""Flags have one normal form; aliases are data; what is wrong is named."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.engines.flags import FlagUse, Option, OptionTable, arrange, collapse
from pool_managerd.engines.llamacpp.options import recorded_options
from pool_managerd.errors import SpecError

TABLE = recorded_options()


def normalise(table: OptionTable, flags: Sequence[str]) -> tuple[str, ...]:
    return arrange(collapse(table.parse(flags)).values())


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("--ngl", "--n-gpu-layers"),
        ("-ngl", "--n-gpu-layers"),
        ("--gpu-layers", "--n-gpu-layers"),
        ("--context", "--ctx-size"),
        ("--ctx", "--ctx-size"),
        ("-c", "--ctx-size"),
        ("-np", "--parallel"),
        ("-t", "--threads"),
        ("--temp", "--temperature"),
    ],
)
def test_an_alias_becomes_the_real_flag(written: str, canonical: str) -> None:
    assert normalise(TABLE, [written, "5"]) == (canonical, "5")


def test_duplicates_collapse_and_the_last_wins_whatever_it_is_called() -> None:
    assert normalise(TABLE, ["-c", "1", "--ctx-size", "2", "--ctx", "3"]) == ("--ctx-size", "3")


def test_of_a_list_every_use_is_kept_in_its_order() -> None:
    written = ["--lora", "b", "--override-kv=k=int:1", "-ot", "x=CPU", "--lora=a", "--override_kv", "l=int:2", "-ot", "a=CPU"]
    assert normalise(TABLE, written) == (
        "--lora", "b", "--lora", "a", "--override-kv", "k=int:1", "--override-kv", "l=int:2",
        "--override-tensor", "x=CPU", "--override-tensor", "a=CPU",
    )  # fmt: skip
    assert normalise(TABLE, normalise(TABLE, written)) == normalise(TABLE, written)


def test_a_list_whose_uses_have_two_values_keeps_the_pairs_together() -> None:
    table = OptionTable([Option(("--lora-scaled",), values=2)], lists=frozenset({"--lora-scaled"}))
    assert normalise(table, ["--lora-scaled", "a", "1", "--lora-scaled", "b", "2"]) == (
        "--lora-scaled", "a", "1", "--lora-scaled", "b", "2",
    )  # fmt: skip


def test_underscores_in_long_names_are_hyphens_and_stay_as_they_are_in_values() -> None:
    assert normalise(TABLE, ["--top_p", "0.5", "--chat_template_file=a_b"]) == ("--chat-template-file", "a_b", "--top-p", "0.5")


def test_all_that_is_wrong_with_a_list_of_flags_is_found_at_once() -> None:
    wrong = ["--ctx-siz", "4", "--metrics", "--threds", "--top-k", "--no-webui=1", "--frobnicate", "x"]
    messages = [error.message for error in TABLE.sift(wrong)[1]]
    assert [next(word for word in wrong if word.partition("=")[0] in message) for message in messages] == [
        "--ctx-siz", "--threds", "--top-k", "--no-webui=1", "--frobnicate",
    ]  # fmt: skip
    assert "did you mean '--ctx-size'" in messages[0]
    with pytest.raises(SpecError) as caught:
        TABLE.parse(wrong)
    assert caught.value.message == "; ".join(messages), "one start tells all of it"
    assert len(TABLE.sift(["--metrics", "--top-k", "4"])[0]) == 2


def test_a_flag_and_its_negation_are_one_option() -> None:
    assert normalise(TABLE, ["--mmap", "--no-mmap"]) == ("--no-mmap",)
    assert normalise(TABLE, ["-nkvo", "--kv-offload"]) == ("--kv-offload",)
    assert normalise(TABLE, ["-no-kvu"]) == ("--no-kv-unified",)


def test_flags_are_sorted_by_name_and_keep_their_values() -> None:
    written = ["--threads", "4", "--control-vector-layer-range", "1", "2", "--batch-size=64", "--metrics"]
    assert normalise(TABLE, written) == (
        "--batch-size", "64", "--control-vector-layer-range", "1", "2", "--metrics", "--threads", "4",
    )  # fmt: skip


def test_a_value_may_begin_with_a_dash() -> None:
    assert normalise(TABLE, ["--seed", "-1"]) == ("--seed", "-1")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["--threads"], "cannot use the flag --threads: it needs a value"),
        (["--threads", "--metrics"], "cannot use the flag --threads: it needs a value but is followed by --metrics"),
        (["--control-vector-layer-range", "1"], "cannot use the flag --control-vector-layer-range: it needs a value"),
        (["--thread", "4"], "cannot use the flag '--thread': this engine does not know it (did you mean '--threads'?)"),
        (["--zzzzzzzzzzz"], "cannot use the flag '--zzzzzzzzzzz': this engine does not know it"),
        (["4"], "cannot use '4' as a flag: flags begin with a dash"),
        (["--metrics", "on"], "cannot use 'on' as a flag: flags begin with a dash"),
        (["--metrics=on"], "cannot use the flag --metrics='on': it takes no value"),
    ],
)
def test_what_is_wrong_with_a_flag_is_named(written: list[str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        normalise(TABLE, written)
    assert caught.value.message == message


def test_flags_are_bounded() -> None:
    for flags in (["--metrics"] * 1000, ["--alias", "x" * 10_000], ["--alias", "a\0b"]):
        with pytest.raises(SpecError, match="cannot use these flags"):
            normalise(TABLE, flags)


def test_an_alias_of_a_negation_stays_negative() -> None:
    table = OptionTable([Option(("--webui",), ("--no-webui",))], {"--no-ui": "--no-webui"})
    assert normalise(table, ["--no-ui"]) == ("--no-webui",)


_values = st.from_regex(r"[A-Za-z0-9.,/-]{1,12}", fullmatch=True).filter(lambda value: value not in TABLE)


@st.composite
def uses(draw: st.DrawFn) -> list[list[str]]:
    """Different options, each as written in argv by one of its names."""
    options = draw(st.lists(st.sampled_from(TABLE.options), unique_by=lambda option: option.canonical, max_size=8))
    return [
        [draw(st.sampled_from((*option.names, *option.negated))), *(draw(_values) for _ in range(option.values))]
        for option in options
    ]


@given(uses(), st.randoms(use_true_random=False))
def test_the_normal_form_is_stable_and_free_of_order(written: list[list[str]], random: object) -> None:
    flat = [item for use in written for item in use]
    once = normalise(TABLE, flat)
    assert normalise(TABLE, once) == once
    shuffled = list(written)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert normalise(TABLE, [item for use in shuffled for item in use]) == once


@given(uses())
def test_nothing_is_lost_or_made_up(written: list[list[str]]) -> None:
    once = normalise(TABLE, [item for use in written for item in use])
    parsed = TABLE.parse(once)
    assert sorted(use.values for use in parsed) == sorted(tuple(values) for _, *values in written)
    assert all(isinstance(use, FlagUse) for use in parsed)


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_list_is_flags_or_a_spec_error(flags: list[str]) -> None:
    try:
        normalise(TABLE, flags)
    except SpecError as error:
        assert error.message.startswith("cannot use")
