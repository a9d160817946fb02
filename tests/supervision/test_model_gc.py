"""What goes of the cache of models: never what anything needs, whoever asks at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.model_keeping import DAY_S, Leftover, Limits
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import PoolError, RequestError, SpecError
from pool_managerd.supervision.model_cache import ModelCacheWork
from pool_managerd.testing.manual_clock import settle
from tests.supervision.fake_shelf import FakeShelf
from tests.supervision.test_apply import ApplyWorld

OWN, OTHER, THIRD = "file:m.gguf", "hf:org/other:Q8_0", "hf:org/third:Q8_0"


class CacheWorld(ApplyWorld):
    """One pool, ``a``, which runs ``OWN``; the cache has that and two more, which nobody has needed for a month."""

    def __init__(self) -> None:
        super().__init__("a")
        self.shelf = FakeShelf(OWN, OTHER, THIRD)
        self.cache = ModelCacheWork(self.pools, self.services, self.shelf, lambda: self.config)
        self.care: asyncio.Task[None] | None = None

    async def up_a(self) -> None:
        self.pools.add("a", self.config.pools[0])
        operation = await self.pools.change(self.pools.get("a"), "start", _start(), "up", desired="up")
        await settle()
        assert operation.status == "succeeded"

    def set(self, **models: Any) -> None:
        self.use(Config.model_validate({**self.config.model_dump(exclude={"base_dir"}), "models": models}))

    async def why(self, ref: str) -> str:
        """Why it stays; empty where it would go."""
        rows = (await self.cache.gc.plan(None))["rows"]
        return next("" if row["action"] == "delete" else row["why"] for row in rows if row["name"] == ref)

    async def refusal(self, ref: str) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await self.cache.remove(ref)
        assert caught.value.code == "MODEL_IN_USE" and caught.value.status == 409 and ref in self.shelf.models
        return caught.value

    async def both(self, ref: str) -> str:
        """What gc and rm say alike of why it stays."""
        why = await self.why(ref)
        assert why and why in (await self.refusal(ref)).message
        return why


def _start() -> Any:
    from pool_managerd.core.lifecycle import events as ev

    return ev.Start()


@pytest.fixture
async def world() -> AsyncIterator[CacheWorld]:
    made = CacheWorld()
    await made.up_a()
    yield made
    if made.care is not None:
        made.care.cancel()
    await made.cache.close()
    await made.applies.close()
    await made.reloads.close()
    await made.pools.close()


# --- who needs a model ---


async def test_what_a_pool_is_configured_with_or_runs_stays(world: CacheWorld) -> None:
    assert await world.both(OWN) == "pool a is configured with it"
    assert await world.why(OTHER) == await world.why(THIRD) == ""
    assert [row["pools"] for row in await world.cache.rows()] == [["a"], [], []]


async def test_what_a_reload_tries_and_what_it_would_go_back_to_stay(world: CacheWorld) -> None:
    world.fakes.models.stuck = True
    await world.reloads.begin(ReloadRequest("a", new_model_ref=OTHER))
    await settle()
    assert world.reloads.stage_of("a") == "staging", "no instance has it yet"
    assert await world.both(OTHER) == "pool a is being reloaded to it"
    assert await world.both(OWN) == "pool a is configured with it"


async def test_what_ran_before_stays_while_it_is_not_known_whether_the_new_one_does(world: CacheWorld) -> None:
    await world.reloads.begin(ReloadRequest("a", new_model_ref=OTHER))
    seen = set()
    for _ in range(200):
        if world.reloads.stage_of("a") is None:
            break
        for ref in (OWN, OTHER):
            assert await world.why(ref), f"{ref} may go while the reload is {world.reloads.stage_of('a')}"
        seen.add(world.reloads.stage_of("a"))
        await world.fakes.clock.advance(0.25)
        await asyncio.sleep(0.001)
    assert {"gating"} <= seen and world.reloads.stage_of("a") is None
    assert await world.both(OTHER) == "pool a is configured with it"
    assert await world.why(OWN) == "pool a is configured with it", "the file still says so"


async def test_what_an_apply_is_about_to_bring_stays(world: CacheWorld) -> None:
    async def first(_plan: Any) -> None:
        assert await world.both(OTHER) == "pool b is being changed to it"

    operation = await world.begin(world.file({"id": "a"}, {"id": "b", "model": OTHER}), first=first)
    await world.ended(operation)
    assert operation.status == "succeeded" and await world.both(OTHER) == "pool b is configured with it"


async def test_an_apply_that_is_refused_needs_nothing_any_more(world: CacheWorld) -> None:
    async def first(_plan: Any) -> None:
        raise SpecError("no")

    with pytest.raises(SpecError):
        await world.begin(world.file({"id": "a"}, {"id": "b", "model": OTHER}), first=first)
    assert await world.why(OTHER) == ""


@pytest.mark.parametrize(
    "engine",
    [
        {"model_path": FakeShelf.path(OTHER)}, {"flags": ("--model", FakeShelf.path(OTHER))}, {"model_path": "/cache"},
        {"flags": (f"--mmproj={FakeShelf.path(OTHER)}",)}, {"env": {"MODEL": FakeShelf.path(OTHER)}},
    ],
)  # fmt: skip
async def test_what_a_submitted_engine_names_by_its_path_stays(world: CacheWorld, engine: dict[str, Any]) -> None:
    pool = world.pools.add("b")
    await world.submit(pool, PreparedEngine("b", "/engine", port=1, verbatim=True, **engine))
    assert "pool b " in await world.both(OTHER)


async def test_a_file_that_is_configured_by_its_place_in_the_cache_stays(world: CacheWorld) -> None:
    world.use(world.file({"id": "a"}, {"id": "b", "model": f"file:{FakeShelf.path(OTHER)}"}))
    assert await world.both(OTHER) == "pool b is configured with it"
    world.shelf.leftovers = [Leftover("hf/x.gguf", "file", 7, 99 * DAY_S)]
    world.use(world.file({"id": "a"}, {"id": "b", "model": "file:/cache/hf/x.gguf"}))
    assert await world.why("hf/x.gguf") == "pool b is configured with it"


async def test_a_root_folder_that_an_engine_names_keeps_nothing(world: CacheWorld) -> None:
    pool = world.pools.add("b")
    await world.submit(pool, PreparedEngine("b", "/engine", port=1, verbatim=True, model_path="/", env={"HOME": "/"}))
    assert await world.why(OTHER) == ""


async def test_a_pool_that_was_stopped_keeps_what_it_is_configured_with_and_not_what_it_ran(world: CacheWorld) -> None:
    await world.apply(world.file({"id": "a", "model": OTHER}))
    assert await world.both(OTHER) == "pool a is configured with it"
    assert await world.why(OWN) == ""


# --- two at once ---


async def test_a_pool_that_comes_between_the_decision_and_the_deletion_keeps_its_model(world: CacheWorld) -> None:
    def starts(ref: str) -> None:
        if ref == OTHER:
            world.use(world.file({"id": "a"}, {"id": "b", "model": THIRD}))

    world.shelf.on_remove = starts
    found = await world.cache.gc.run(None)
    assert THIRD in world.shelf.models and OTHER not in world.shelf.models
    row = next(row for row in found["rows"] if row["name"] == THIRD)
    assert (row["action"], row["why"], row["frees_bytes"]) == ("keep", "somebody has begun to need it", 0)
    assert found["freed_bytes"] == 100


async def test_a_use_that_is_noted_while_the_deletion_is_under_way_keeps_it(world: CacheWorld) -> None:
    world.shelf.gate = asyncio.Event()
    removing = asyncio.create_task(world.cache.remove(OTHER))
    await settle()
    await world.shelf.pin(OTHER, pinned=False)  # somebody needs it now
    world.shelf.gate.set()
    with pytest.raises(RequestError, match="somebody has begun to"):
        await removing
    assert OTHER in world.shelf.models


async def test_a_pull_and_a_deletion_of_the_same_model_refuse_each_other(world: CacheWorld) -> None:
    world.shelf.gate = asyncio.Event()
    removing = asyncio.create_task(world.cache.remove(OTHER))
    await settle()
    for ask in (world.cache.pull, world.cache.verify):
        with pytest.raises(RequestError, match="fetched, verified or deleted already"):
            await ask(OTHER)
    with pytest.raises(RequestError, match="just being deleted"):
        await world.cache.remove(OTHER)
    world.shelf.gate.set()
    assert (await removing)["freed_bytes"] == 100
    world.shelf.now_fetching = {THIRD}
    assert await world.both(THIRD) == "it is being fetched or verified"


async def test_gc_keeps_what_is_being_fetched_for_whomever(world: CacheWorld) -> None:
    world.shelf.now_fetching = {OTHER}
    await world.cache.gc.run(0)
    assert sorted(world.shelf.models) == [OWN, OTHER]


# --- pins ---


async def test_a_pin_keeps_a_model_until_it_is_taken_back_and_each_is_told_once(world: CacheWorld) -> None:
    for _ in range(2):
        row = await world.cache.pin(OTHER, pinned=True)
        assert row["pinned"]
    assert await world.both(OTHER) == "it is pinned"
    assert "models unpin" in str((await world.refusal(OTHER)).hint)
    assert not (await world.cache.pin(OTHER, pinned=False))["pinned"]
    assert world.fakes.types().count("model_pinned") == 2
    assert (await world.cache.remove(OTHER))["freed_bytes"] == 100
    with pytest.raises(RequestError, match="not in the cache"):
        await world.cache.pin(OTHER, pinned=True)


# --- limits ---


async def test_a_plan_changes_nothing_and_a_run_does_what_it_said(world: CacheWorld) -> None:
    world.shelf.leftovers = [Leftover("partial/x.part", "download", 40, 30 * DAY_S)]
    planned = await world.cache.gc.plan(None)
    assert world.shelf.kept == [False] and len(world.shelf.models) == 3 and world.shelf.needed == world.shelf.retired == []
    done = await world.cache.gc.run(None)
    assert done == planned and done["freed_bytes"] == 240 and world.shelf.leftovers == []
    assert sorted(world.shelf.models) == [OWN]
    (event,) = [event for event in world.fakes.told if event.type == "models_gc"]
    assert event.fields["bytes"] == 240 and "3 things" in event.human


async def test_a_limit_of_the_cache_lets_no_more_go_and_an_age_that_is_asked_for_does(world: CacheWorld) -> None:
    world.set(max_bytes=250)
    assert (await world.cache.gc.plan(0))["freed_bytes"] == 200
    world.shelf.limits = Limits(free_bytes=1 << 40, max_bytes=250)
    await world.cache.gc.run(None)
    assert len(world.shelf.models) == 2, "with one less it holds"
    assert world.shelf.retired == [ref for ref in world.shelf.models if ref != OWN], "the other one is the next to go"


async def test_a_download_that_does_not_fit_makes_room_only_where_that_is_allowed(world: CacheWorld) -> None:
    assert world.shelf.made_room is not None
    short = Limits(used_bytes=300, free_bytes=1 << 40, max_bytes=300, need_bytes=50)
    told = await world.shelf.made_room(short)
    assert told == f"pool-managerd models gc --older-than 7d would free 100 B: {OTHER}" and len(world.shelf.models) == 3
    world.set(gc={"enabled": True})
    assert await world.shelf.made_room(short) == "" and sorted(world.shelf.models) == [OWN, THIRD]
    told = await world.shelf.made_room(Limits(used_bytes=200, free_bytes=1 << 40, max_bytes=200, need_bytes=150))
    assert "would free 100 B" in told and sorted(world.shelf.models) == [OWN, THIRD], "nothing goes where it does not suffice"
    del world.shelf.models[THIRD]
    assert await world.shelf.made_room(short) == "", "there is nothing to be said of it"


async def test_the_node_keeps_the_limits_by_itself_where_that_is_allowed_and_notes_what_is_needed(world: CacheWorld) -> None:
    world.shelf.limits = Limits(free_bytes=10, keep_free_bytes=60)
    world.care = asyncio.create_task(world.cache.gc.care())
    await settle()
    assert world.shelf.needed == [OWN] and len(world.shelf.models) == 3
    assert world.cache.gc.figures == {"bytes": 300, "active": 1, "retired": 2}
    world.set(gc={"enabled": True})
    await world.fakes.clock.advance(901)
    assert sorted(world.shelf.models) == [OWN, THIRD], "one is enough"


async def test_a_cache_that_cannot_be_read_is_told_and_the_care_goes_on(
    world: CacheWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = world.shelf.stock

    async def broken(*_args: Any, **_more: Any) -> Any:
        raise PoolError("cannot read the note", code="CATALOG_TOO_NEW")

    monkeypatch.setattr(world.shelf, "stock", broken)
    world.care = asyncio.create_task(world.cache.gc.care())
    await settle()
    assert [event.human for event in world.fakes.told if "cannot be looked after" in event.human]
    monkeypatch.setattr(world.shelf, "stock", real)
    await world.fakes.clock.advance(901)
    assert world.cache.gc.figures is not None


async def test_nothing_is_deleted_for_a_download_that_would_not_fit_all_the_same(world: CacheWorld) -> None:
    """All that nobody needed was, and the download refused after that."""
    world.set(gc={"enabled": True, "keep_days": 0})
    assert world.shelf.made_room is not None
    said = await world.shelf.made_room(Limits(free_bytes=0, need_bytes=10**6))
    assert "all that may go would free" in said and set(world.shelf.models) == {OWN, OTHER, THIRD}


async def test_who_pulls_what_is_being_pulled_joins_and_anybody_may_break_it_off(
    world: CacheWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def fetch(*_: Any, **__: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(world.services.models, "fetch", fetch)
    first = await world.cache.pull("hf:org/new:Q8_0")
    await begun.wait()
    assert await world.cache.pull("hf:org/new:Q8_0") is first
    ended = await world.cache.cancel("hf:org/new:Q8_0")
    assert ended is first and ended.status == "failed" and ended.error is not None
    assert "it was cancelled" in ended.error.message
    with pytest.raises(RequestError) as caught:
        await world.cache.cancel("hf:org/new:Q8_0")
    assert caught.value.code == "MODEL_NOT_BUSY"
