"""What may be asked of a bench, and what its answers say."""

from __future__ import annotations

from typing import Any

import pytest

from pool_managerd.core.bench import BenchRequest, Round, TimedAnswer, baseline, figures, percentile, prompt, words_for
from pool_managerd.errors import SpecError


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 1},
        {"tokens": 2_049},
        {"prompt_tokens": 0},
        {"prompt_tokens": 16_385},
        {"runs": 0},
        {"runs": 21},
        {"runs": True},
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"cannot bench pool p with {next(iter(wrong))} .* must be from"):
        BenchRequest("p", **wrong)


@pytest.mark.parametrize(
    ("asked", "room", "sizes"),
    [
        ({}, None, (512, 128)),
        ({}, 1_024, (512, 128)),
        ({}, 100, (50, 25)),
        ({"tokens": 60}, 100, None),
        ({"tokens": 50}, 100, (50, 50)),
        ({"prompt_tokens": 9_000}, None, (9_000, 128)),
        ({}, 4, (2, 2)),
    ],
)
def test_what_is_not_said_is_what_fits_and_what_is_said_is_never_less(
    asked: dict[str, Any], room: int | None, sizes: tuple[int, int] | None
) -> None:
    request = BenchRequest("p", **asked)
    if sizes is None:
        with pytest.raises(SpecError, match="50 tokens of prompt and 60 to make: a slot has 100 tokens of context"):
            request.sizes(room)
    else:
        assert request.sizes(room) == sizes


def test_prompts_differ_from_their_first_word_on_and_are_as_long_as_was_counted() -> None:
    assert prompt(3, "a 1:") == "a 1: river stone lamp" and prompt(3, "a 2:").split()[1] != prompt(3, "a 1:").split()[1]
    assert words_for(512, (4, 10), (12, 18)) == 506, "one token a word, six before them"
    assert words_for(512, (4, 30), (12, 70)) == 100, "five a word, ten before them"
    assert words_for(1, (4, 10), (12, 18)) == 1 and words_for(8, (4, 10), (12, 10)) == 1


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([3.0], 0.99) == 3.0 and percentile([], 0.5) == 0.0


def answer(first_s: float, gap_s: float, tokens: int = 11, **told: Any) -> TimedAnswer:
    return TimedAnswer(tuple(first_s + gap_s * number for number in range(tokens)), tokens, **told)


def test_the_figures_of_one_request_and_of_all_slots() -> None:
    alone = [Round((answer(0.5, 0.1, prompt_tokens=100),), 1.5)]
    both = (answer(1.0, 0.2, prompt_tokens=100), answer(2.0, 0.2, prompt_tokens=100, prompt_tokens_per_s=77.0))
    found = figures(alone, [Round(both, 4.0)], 2)
    assert found == {
        "tokens": 11, "prompt_tokens": 100, "runs": 1, "slots": 2,
        "alone": {
            "requests": 1, "runs": 1, "first_token_ms_p50": 500.0, "between_tokens_ms_p50": 100.0, "between_tokens_ms_p99": 100.0,
            "tokens_per_s": 10.0, "tokens_per_s_total": 7.33, "prompt_tokens_per_s": 200.0,
        },
        "full": {
            "requests": 2, "runs": 1, "first_token_ms_p50": 1000.0, "between_tokens_ms_p50": 200.0,
            "between_tokens_ms_p99": 200.0, "tokens_per_s": 5.0, "tokens_per_s_total": 5.5, "prompt_tokens_per_s": 77.0,
        },
    }  # fmt: skip
    kept = baseline(found, 5)
    assert (kept.first_token_ms, kept.tokens_per_s, kept.samples, kept.measured_at_ms) == (500.0, 10.0, 1, 5)
    assert kept.measured_with == "bench of 11 tokens behind a prompt of 100, one run" and kept.kind == "bench"


def test_what_an_engine_does_not_tell_is_not_made_up() -> None:
    found = figures([Round((answer(0.5, 0.1),), 1.5)], [], 1)
    assert found["prompt_tokens"] is None and found["alone"]["prompt_tokens_per_s"] is None and found["full"] is None
    assert baseline(found, 5).measured_with == "bench of 11 tokens, one run"
