"""What is set and has no effect is said, wherever it stands; what is left out or read is not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pool_managerd.config import Config
from pool_managerd.config.schema import not_in_force
from pool_managerd.daemon import check
from pool_managerd.errors import SpecError


def test_every_key_that_is_set_and_not_read_is_named_with_its_path() -> None:
    pool = {"id": "a", "engine": "llamacpp", "model": "file:m", "slots": 2, "require_same_engine_version": True}
    config = Config.model_validate({
        "supervision": {"stop_grace_ms": 1}, "policy": {"allow_domains": ["a.example"]}, "pools": [pool],
    })  # fmt: skip
    assert list(not_in_force(config)) == ["pools[0].require_same_engine_version"]


def test_defaults_are_no_promise() -> None:
    assert list(not_in_force(Config())) == []


def test_a_check_refuses_what_nothing_reads_and_says_what_to_do() -> None:
    check(Config(), {})
    pool = {"id": "a", "engine": "llamacpp", "model": "file:m", "require_same_engine_version": True}
    with pytest.raises(SpecError, match=r"cannot honour pools\[0\]\.require_same_engine_version: nothing reads it") as refused:
        check(Config.model_validate({"pools": [pool]}), {})
    assert refused.value.hint == "leave it out"


@pytest.mark.parametrize(
    "daemon", [{"runtime_dir": "here", "state_dir": "./here"}, {"bind": "127.0.0.1:9200", "metrics_bind": "127.0.0.1:9200"}]
)
def test_one_directory_or_address_for_two_things_is_refused(daemon: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"same directory|control API's own address"):
        Config.model_validate({"daemon": daemon})


def test_a_pools_own_reload_rules_hold_key_by_key_and_a_prompt_of_its_own_has_its_own_answer() -> None:
    node = {"smoke_prompt": "2 + 2?", "smoke_expect": "4", "bake_ms": 1}
    pools: list[dict[str, Any]] = [
        {"id": "a", "reload": {"bake_ms": 60_000, "baseline_share": 0.9}}, {"id": "b", "reload": {"smoke_prompt": "Say hello"}},
        {"id": "c", "reload": {"smoke_expect": "four"}}, {"id": "d"},
    ]  # fmt: skip
    config = Config.model_validate({"reload": node, "pools": [{**pool, "engine": "llamacpp", "model": "m"} for pool in pools]})
    a, b, c, d = (config.reload_rules(pool) for pool in config.pools)
    assert (a.smoke_prompt, a.smoke_expect, a.bake_ms, a.baseline_share) == ("2 + 2?", "4", 60_000, 0.9)
    assert (b.smoke_prompt, b.smoke_expect, b.bake_ms) == ("Say hello", None, 1), "not what another question is answered with"
    assert (c.smoke_prompt, c.smoke_expect) == ("2 + 2?", "four")
    assert d == config.reload_rules(None) == config.reload
    with pytest.raises(ValidationError):
        Config.model_validate({"pools": [{"id": "a", "engine": "llamacpp", "model": "m", "reload": {"bake_ms": -1}}]})
