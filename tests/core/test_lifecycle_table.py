"""The table is total, stale news changes nothing, and every rule of one instance holds after every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import TABLE, Instance, Phase, Policy, PoolState, next_timer, step, validate, view
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from tests.core.histories import SAMPLES, drains, leases, news, policies


def concrete_events() -> set[type[ev.Event]]:
    kinds = {kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)}
    return kinds - {ev.Event, ev.EpochEvent}


def test_every_phase_and_event_pair_is_decided() -> None:
    assert set(TABLE) == concrete_events()
    for event, row in TABLE.items():
        assert set(row) == set(Phase), event.__name__


def test_the_samples_cover_every_event() -> None:
    assert {type(event) for event in SAMPLES} == concrete_events()


@given(data=st.data(), policy=policies)
def test_random_histories_never_break_a_rule(data: st.DataObject, policy: Policy) -> None:
    i, now = PoolState.new("p"), 100.0
    for _ in range(data.draw(st.integers(1, 60))):
        now += data.draw(st.sampled_from([0.0, 0.01, 0.5, 3.0, 40.0, 700.0]))
        epoch = data.draw(st.sampled_from([i.active.epoch, i.active.epoch, i.active.epoch, max(0, i.active.epoch - 1)]))
        event = data.draw(st.one_of(st.sampled_from(SAMPLES), st.sampled_from(news(epoch)), drains, leases, st.just(ev.Tick())))
        before = i
        i, effects = step(before, event, now, policy)
        validate(i, now, policy)
        assert i.active.epoch >= before.active.epoch or isinstance(event, ev.Adopt)
        assert i.crash_count >= before.crash_count and i.restart_count >= before.restart_count
        if i.active.phase is not before.active.phase:
            assert any(isinstance(effect, do.Say) for effect in effects), "every transition is told in a sentence"
        if any(isinstance(effect, do.Refuse) for effect in effects):
            assert i == before, "a refused request changes nothing"


@given(data=st.data())
def test_ready_comes_only_with_a_good_probe_of_this_launch(data: st.DataObject) -> None:
    i, now, policy, good_epoch = PoolState.new("p"), 0.0, Policy(), -1
    for _ in range(40):
        now += 0.1
        event = data.draw(st.one_of(st.sampled_from(SAMPLES), st.sampled_from(news(i.active.epoch)), st.just(ev.Tick())))
        if isinstance(event, ev.ProbeSucceeded | ev.WarmedUp | ev.CacheRestored) and event.epoch == i.active.epoch:
            good_epoch = i.active.epoch
        i, _ = step(i, event, now, policy)
        assert not view(i).ready or good_epoch == i.active.epoch


@pytest.mark.parametrize("event", [e for e in SAMPLES if isinstance(e, ev.EpochEvent)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("phase", list(Phase))
def test_news_of_an_older_launch_changes_nothing(phase: Phase, event: ev.EpochEvent) -> None:
    i = PoolState(Instance(InstanceId("p"), epoch=event.epoch + 1, phase=phase, deadline=9.0))
    assert step(i, event, 5.0, Policy()) == (i, ())


@given(data=st.data(), policy=policies)
def test_every_history_can_be_brought_down(data: st.DataObject, policy: Policy) -> None:
    """Stop, and if the process does not answer, only the passing of time, always ends without a process or says why not."""
    i, now = PoolState.new("p"), 0.0
    for _ in range(data.draw(st.integers(0, 30))):
        now += 0.2
        i, _ = step(i, data.draw(st.one_of(st.sampled_from(SAMPLES), st.sampled_from(news(i.active.epoch)))), now, policy)
    i, _ = step(i, ev.Stop(), now, policy)
    for _ in range(10):
        if i.active.phase in (Phase.DOWN, Phase.FAILED):
            break
        now = (next_timer(i, policy) or now) + 0.01
        i, effects = step(i, ev.Tick(), now, policy)
        if any(isinstance(effect, do.KillEngine) for effect in effects):
            i, _ = step(i, ev.Exited(i.active.epoch, signal=9), now, policy)
    assert i.active.phase in (Phase.DOWN, Phase.FAILED)
    assert not view(i).ready
