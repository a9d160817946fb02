"""The engines that can be configured, and what is taken for granted of one that is not known."""

from __future__ import annotations

import pytest

from pool_managerd.core.engines import ENGINES, known_engine, startup_ms


def test_an_engine_that_is_known_is_its_name() -> None:
    assert [known_engine(name) for name in ENGINES] == list(ENGINES)


def test_an_engine_that_is_not_known_is_refused_with_those_that_are_and_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"^must be 'llamacpp', .*'tgi' or 'triton' \(did you mean 'vllm'\?\)$"):
        known_engine("vlm")
    with pytest.raises(ValueError, match=r"'triton'$"):
        known_engine("something else")


def test_an_engine_that_compiles_first_has_longer_to_answer_than_others() -> None:
    assert startup_ms("vllm", 120_000) == 900_000
    assert startup_ms("llamacpp", 120_000) == startup_ms("one that is not known", 120_000) == 120_000
