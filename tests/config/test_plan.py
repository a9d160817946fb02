"""What another configuration means for pools that run: who is touched, how, and in which order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.config import Config, PoolConfig
from pool_managerd.config.load import load_text, load_values
from pool_managerd.config.plan import Action, Plan, PoolNow, Step, plan_of, with_pool, with_sections, without_pool
from pool_managerd.config.pools import DECIDED

HERE = Path("/etc/pm")
KEYS: dict[str, list[Any]] = {
    "preload": [True, False], "slots": [1, 2, 4], "ctx": [None, 512, 1024], "restart": [None, "always"], "quant": [None, "Q8_0"],
    "startup_timeout_ms": [None, 9_000], "served_name": [None, "m"],
}  # fmt: skip


def config(*pools: dict[str, Any], **sections: Any) -> Config:
    written = [{"engine": "llamacpp", "model": "file:m.gguf", **pool} for pool in pools]
    return load_values({"pools": written, **sections}, HERE)


def ready(of: Config, **known: Any) -> dict[str, PoolNow]:
    """Every pool of it runs."""
    return {pool.id: PoolNow(pool, **{"serves": True, "wanted": True, **known}) for pool in of.pools}


def steps(plan: Plan) -> list[tuple[str, str]]:
    return [(step.action.value, step.pool_id) for step in plan.steps]


def only(plan: Plan) -> Step:
    assert len(plan.steps) == 1, plan.steps
    return plan.steps[0]


@pytest.mark.parametrize(
    ("change", "action"),
    [
        ({"ctx": 1024}, Action.RELOAD), ({"model": "file:n.gguf"}, Action.RELOAD), ({"slots": 2}, Action.RELOAD),
        ({"provisioning": {"flags": ["--threads", "2"]}}, Action.RELOAD), ({"engine": "vllm"}, Action.RELOAD),
        ({"preload": False}, Action.TAKE_OVER), ({"restart": "never"}, Action.TAKE_OVER),
        ({"startup_timeout_ms": 5}, Action.TAKE_OVER), ({"restart": "never", "ctx": 9}, Action.RELOAD),
        ({"provisioning": {"mode": "external", "url": "http://127.0.0.1:1"}}, Action.RESTART),
    ],
)  # fmt: skip
def test_only_what_an_engine_was_launched_by_touches_an_engine(change: dict[str, Any], action: Action) -> None:
    old, new = config({"id": "a"}, {"id": "b"}), config({"id": "a", **change}, {"id": "b"})
    plan = plan_of(old, new, ready(old))
    assert (only(plan).action, only(plan).pool_id, plan.untouched) == (action, "a", 1) and plan.would_change
    assert {key["key"].partition(".")[0] for key in only(plan).changes} == set(change)


def test_what_only_looks_different_is_in_no_plan() -> None:
    first = "pools:\n  - {id: a, engine: llamacpp, model: 'file:m.gguf'}\n  - {id: b, engine: llamacpp, model: 'file:m.gguf'}\n"
    other = """# another order, a comment, a default that is written out, an anchor
x-common: &m {model: "file:m.gguf", engine: llamacpp}
pools:
  - <<: *m
    id: b
    slots: 1

  - {model: file:m.gguf, provisioning: {}, engine: llamacpp, devices: [], id: a}
profile: home
"""
    old, new = (load_text(text, HERE / "pm.yaml", env={}) for text in (first, other))
    plan = plan_of(old, new, ready(old), prune=True)
    assert (plan.steps, plan.at_once, plan.waiting, plan.would_change, plan.untouched) == ((), (), (), False, 2)


def test_what_goes_comes_first_then_what_changes_then_what_is_new() -> None:
    old = config({"id": "gone"}, {"id": "big"}, {"id": "light"}, {"id": "same"})
    new = config({"id": "fresh"}, {"id": "big", "ctx": 9}, {"id": "light", "preload": False}, {"id": "same"})
    plan = plan_of(old, new, ready(old), prune=True)
    assert steps(plan) == [("remove", "gone"), ("take_over", "light"), ("reload", "big"), ("add", "fresh")]
    kept = plan_of(old, new, ready(old))
    assert steps(kept)[0] == ("keep", "gone") and "--prune" in kept.steps[0].why and kept.untouched == 1
    assert plan.digest != kept.digest == plan_of(old, new, ready(old)).digest
    assert not plan_of(old, config({"id": "big"}, {"id": "light"}, {"id": "same"}), ready(old)).would_change, "kept is no change"


@pytest.mark.parametrize(
    ("now", "change", "action"),
    [
        ({"wanted": True}, {"ctx": 9}, Action.START), ({"wanted": True}, {"quant": "Q4_0"}, Action.TAKE_OVER),
        ({"by_demand": True}, {"ctx": 9}, Action.TAKE_OVER), ({}, {"ctx": 9}, Action.TAKE_OVER),
        ({"by_demand": True}, {"preload": True}, Action.START), ({}, {"preload": True}, Action.TAKE_OVER),
    ],
)  # fmt: skip
def test_what_does_not_run_is_only_started_where_it_is_wanted(
    now: dict[str, Any], change: dict[str, Any], action: Action
) -> None:
    """A person who has stopped it has the last word on that."""
    old = config({"id": "a", "preload": False})
    plan = plan_of(old, config({"id": "a", "preload": False, **change}), {"a": PoolNow(old.pools[0], **now)})
    assert only(plan).action is action


def test_a_reload_by_hand_holds_until_the_file_says_something_else_of_that_pool() -> None:
    old = config({"id": "a", "ctx": 512}, {"id": "b"})
    by_hand = config({"id": "a", "ctx": 2048}).pools[0]
    now = ready(old) | {"a": PoolNow(by_hand, serves=True, wanted=True, reloaded=("ctx",))}
    assert steps(plan_of(old, config({"id": "a", "ctx": 512}, {"id": "b", "slots": 2}), now)) == [("reload", "b")]
    same = plan_of(old, old, now)
    assert not same.would_change and [pool.ctx for pool in same.by_hand] == [512], "named, with what the file says"
    gone_on = plan_of(old, old, now | {"a": replace(now["a"], outdated=True)})
    assert steps(gone_on) == [("reload", "a")] and gone_on.by_hand == same.by_hand, "this reload keeps what is by hand"
    other = only(plan_of(old, config({"id": "a", "ctx": 512, "slots": 2}, {"id": "b"}), now))
    assert other.action is Action.RELOAD and "by hand (ctx) does not hold" in other.why
    assert [change["key"] for change in other.changes] == ["ctx", "slots"]
    assert not plan_of(old, config({"id": "a", "ctx": 512, "slots": 2}, {"id": "b"}), now).by_hand
    written = only(plan_of(old, config({"id": "a", "ctx": 2048}, {"id": "b"}), now))
    assert (written.action, written.changes) == (Action.TAKE_OVER, ()), "the file says now what runs already"


def test_an_engine_that_an_earlier_file_launched_is_reloaded() -> None:
    old = config({"id": "a"})
    step = only(plan_of(old, old, ready(old, outdated=True)))
    assert (step.action, step.said, step.changes) == (Action.RELOAD, False, ()) and "earlier configuration" in step.why


def test_sections_are_taken_over_or_wait_for_another_start() -> None:
    old = config({"id": "a"})
    new = config(
        {"id": "a"}, daemon={"bind": "127.0.0.1:1"}, profile="dev", supervision={"stop_grace_ms": 1},
        telemetry={"log_level": "debug", "log_format": "json"}, gpu={"vram_wait_ms": 5, "overhead_mib": 1},
    )  # fmt: skip
    plan = plan_of(old, new, ready(old))
    assert plan.steps == () and plan.untouched == 1
    assert set(plan.at_once) == {"supervision.stop_grace_ms", "telemetry.log_level", "gpu.vram_wait_ms"} and plan.changes_rules
    assert set(plan.waiting) >= {"daemon.bind", "profile", "telemetry.log_format", "gpu.overhead_mib"}
    taken = with_sections(old, new)
    assert (taken.supervision.stop_grace_ms, taken.telemetry.log_level, taken.gpu.vram_wait_ms) == (1, "debug", 5)
    assert (taken.profile, taken.daemon, taken.gpu.overhead_mib) == (old.profile, old.daemon, old.gpu.overhead_mib)
    later = plan_of(taken, new, ready(taken))
    assert not later.would_change and later.waiting == plan.waiting, "what waits goes on waiting"


def test_policy_alone_does_not_change_the_rules_of_pools() -> None:
    old = config({"id": "a"})
    plan = plan_of(old, config({"id": "a"}, policy={"allow_schemes": ["file", "hf"]}), ready(old))
    assert plan.at_once == ("policy.allow_schemes",) and not plan.changes_rules and plan.would_change


def test_every_key_that_engines_are_not_launched_by_is_one() -> None:
    assert set(PoolConfig.model_fields) > DECIDED


pools = st.dictionaries(
    st.sampled_from("abcdef"), st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in KEYS.items()})
)


@given(pools, pools, st.booleans())
def test_a_plan_leads_to_what_the_file_says_and_touches_nobody_else(
    first: dict[str, Any], second: dict[str, Any], prune: bool
) -> None:
    old, new = (config(*({"id": pool_id, **keys} for pool_id, keys in made.items())) for made in (first, second))
    plan = plan_of(old, new, ready(old), prune=prune)
    before, wanted = ({pool.id: pool.model_dump() for pool in of.pools} for of in (old, new))
    touched = {step.pool_id for step in plan.steps}
    assert not touched & {pool_id for pool_id, pool in before.items() if wanted.get(pool_id) == pool}
    assert len(touched) == len(plan.steps) and plan.untouched == len(before.keys() | wanted.keys()) - len(touched)
    order = [list(Action).index(step.action) for step in plan.steps]
    assert order == sorted(order)
    reached = old
    for step in plan.steps:
        if step.action is Action.REMOVE:
            reached = without_pool(reached, step.pool_id)
        elif step.config is not None:
            reached = with_pool(reached, step.config)
    kept = {} if prune else {pool_id: pool for pool_id, pool in before.items() if pool_id not in wanted}
    assert {pool.id: pool.model_dump() for pool in reached.pools} == wanted | kept
    again = plan_of(reached, new, ready(reached), prune=prune)
    assert not again.would_change, "once is enough"
