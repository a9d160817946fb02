"""Slots saved and restored, on an engine that answers from a script and a disk in memory; and what the pool makes of it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.question import Question
from pool_managerd.core.slot_cache import Restored, SlotSaving, name_of, temporary_name
from pool_managerd.core.slot_dialect import SlotDialect
from pool_managerd.engines.llamacpp.slots import LlamaSlots
from pool_managerd.errors import NodeError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.slot_cache import SlotCaches
from pool_managerd.supervision.status import status_of
from pool_managerd.testing.fake_parts import FakeEngines
from pool_managerd.testing.fake_slots import FakeSlotStore
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World

KEY = {"model": "m", "engine": "b1", "context": "4096", "slots": "2", "cache": "", "flags": ""}
SAVING = SlotSaving("/run/cache/p/slots", KEY)
BYTES_PER_TOKEN = 1000


def content(tokens: list[int]) -> bytes:
    return struct.pack(f"<III{len(tokens)}i", 0x67677371, 2, len(tokens), *tokens)


class Engine:
    """Has ``slots`` of tokens. While it ``lies``, a restore does nothing; ``fails`` are paths that it answers with an error."""

    def __init__(self, store: FakeSlotStore) -> None:
        self._store = store
        self.slots: dict[int, list[int]] = {0: [], 1: []}
        self.busy: set[int] = set()
        self.lies = False
        self.fails: dict[str, Exception] = {}

    def answer(self, question: Question) -> Any:
        path, body = question.path, dict(question.body or {})
        for what, problem in self.fails.items():
            if what in path:
                raise problem
        if path == "/slots":
            return [
                {"id": slot, "is_processing": slot in self.busy, "n_prompt_tokens": len(held)}
                for slot, held in self.slots.items()
            ]
        if path == "/completion":
            prompt, held = body["prompt"], self.slots[body["id_slot"]]
            cached = sum(a == b for a, b in zip(prompt, held, strict=False))
            return {"timings": {"cache_n": max(0, cached - 1)}}
        slot, name = int(path.split("/")[2].partition("?")[0]), body["filename"]
        if path.endswith("save"):
            held = self.slots[slot]
            self._store.put("p", name, len(held) * BYTES_PER_TOKEN, content(held))
            return {"n_saved": len(held), "n_written": len(held) * BYTES_PER_TOKEN}
        head = self._store.heads["p", name]
        count = struct.unpack_from("<I", head, 8)[0]
        if not self.lies:
            self.slots[slot] = list(struct.unpack_from(f"<{count}i", head, 12))
        return {"n_restored": count}


class Engines(FakeEngines):
    def dialect(self, engine: PreparedEngine) -> SlotDialect | None:
        return LlamaSlots() if engine.keeps_slots else None


class Scene:
    """One pool whose engine runs."""

    def __init__(self, world: World) -> None:
        self.world, self.store = world, FakeSlotStore()
        self.engine, self.config = Engine(self.store), world.config
        world.fakes.prober.answers = self.engine.answer
        self.caches = SlotCaches(
            self.store, Engines(), world.fakes.prober, world.fakes.clock, lambda: self.config
        )  # fmt: skip
        self.told: list[tuple[str, str, dict[str, Any]]] = []

    def emit(self, type_: str, human: str, *, level: str = "info", **fields: Any) -> None:
        self.told.append((type_, human, fields))

    def types(self) -> list[str]:
        return [type_ for type_, _, _ in self.told]

    def reasons(self) -> list[str]:
        return [fields["reason"] for type_, _, fields in self.told if type_ == "cache_lost"]

    def set(self, **slot_cache: Any) -> None:
        self.config = Config.model_validate({"slot_cache": slot_cache})

    async def save(self) -> None:
        await self.caches.save(self.world.p, self.emit)

    async def restore(self) -> Restored:
        return await self.caches.restore(self.world.p, self.emit)

    def another_launch(self, **parts: str) -> None:
        """Nothing is in its slots."""
        self.engine.slots = {0: [], 1: []}
        launch = self.world.p.launch
        engine = launch.prepared
        assert isinstance(engine, PreparedEngine)
        saving = SlotSaving(SAVING.directory, {**KEY, **parts})
        self.world.p.launch = type(launch)(
            launch.epoch, prepared=PreparedEngine("p", "/engine", port=8080, slots_total=2, slots=saving)
        )  # fmt: skip


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    made.fakes.engines.slots = SAVING
    made.pools.add("p", made.config.pools[0])
    await made.pools.change(made.p, "start", ev.Start(), "up")
    await settle()
    yield made
    await made.pools.close()


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


async def test_what_was_saved_is_given_back_proven_and_lies_on_disk_no_longer(scene: Scene) -> None:
    scene.engine.slots = {0: list(range(300)), 1: list(range(1000, 1500))}
    await scene.save()
    assert scene.store.names() == sorted([name_of(KEY, 0, 300), name_of(KEY, 1, 500)])
    assert scene.told[-1][0] == "cache_saved" and scene.told[-1][2]["slots"] == 2 and scene.told[-1][2]["tokens"] == 800
    scene.another_launch()
    assert await scene.restore() == Restored(2, 800)
    assert scene.engine.slots == {0: list(range(300)), 1: list(range(1000, 1500))}
    assert scene.store.names() == [] and scene.types() == ["cache_saved", "cache_restored"]


async def test_a_short_slot_is_not_saved_busy_or_not_and_nobody_needs_to_know(scene: Scene) -> None:
    scene.engine.slots = {0: list(range(255)), 1: list(range(90))}
    scene.engine.busy = {1}
    await scene.save()
    assert scene.store.names() == [] and scene.told == []


async def test_a_slot_that_had_a_request_at_a_planned_stop_is_told_as_lost_and_the_next_status_says_so_once(scene: Scene) -> None:
    scene.engine.slots = {0: list(range(300)), 1: list(range(900))}
    scene.engine.busy = {1}
    await scene.save()
    assert scene.store.names() == [name_of(KEY, 0, 300)] and scene.types() == ["cache_lost", "cache_saved"]
    assert scene.reasons() == ["busy"] and "slot 1 was not saved" in scene.told[0][1]
    scene.another_launch()
    assert await scene.restore() == Restored(1, 300, "slot 1 was not saved: it had a request when it was stopped")
    scene.engine.busy = set()
    await scene.save()
    scene.another_launch()
    assert await scene.restore() == Restored(1, 300)


async def test_an_engine_that_says_it_restored_and_did_not_is_found_out_and_not_asked_to_save_again(scene: Scene) -> None:
    scene.engine.slots[0] = list(range(2000))
    await scene.save()
    scene.another_launch()
    scene.engine.lies = True
    found = await scene.restore()
    assert found.slots == 0 and "had 0 of 2000 tokens" in found.lost
    assert scene.reasons() == ["unproven"] and scene.told[-1][1].startswith("Cache lost in pool 'p'")
    assert scene.store.names() == []
    scene.engine.slots[0] = list(range(2000))
    await scene.save()
    assert scene.store.names() == []


@pytest.mark.parametrize(("part", "word"), [("context", "context"), ("engine", "engine version"), ("model", "model file")])
async def test_another_key_is_given_nothing_back_which_is_said_once_and_the_file_stays(
    part: str, word: str, scene: Scene
) -> None:
    scene.engine.slots[0] = list(range(300))
    await scene.save()
    scene.another_launch(**{part: "another"})
    for _ in range(2):
        assert f"another {word}" in (await scene.restore()).lost
    assert scene.reasons() == ["different"] and len(scene.store.names()) == 1
    assert all("restore" not in question.path for question in scene.world.fakes.prober.questions)
    scene.another_launch()
    assert (await scene.restore()).slots == 1, "as after a reload that is undone"


async def test_the_oldest_files_make_room_and_that_is_said(scene: Scene) -> None:
    scene.set(disk_bytes=900 * BYTES_PER_TOKEN)
    for number, size in enumerate((400_000, 300_000)):
        scene.store.put("q", name_of(KEY, number, 300), size)
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    assert scene.store.names() == sorted([name_of(KEY, 0, 500), name_of(KEY, 1, 300)])
    assert scene.types() == ["cache_removed", "cache_saved"]


async def test_what_is_larger_than_the_budget_is_not_kept_and_makes_nobody_go(scene: Scene) -> None:
    scene.set(disk_bytes=100_000)
    scene.store.put("q", name_of(KEY, 0, 300), 50_000)
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    assert scene.store.names() == [name_of(KEY, 0, 300)] and scene.reasons() == ["budget"]
    scene.told.clear()
    asked = len(scene.world.fakes.prober.questions)
    await scene.save()
    assert scene.reasons() == ["budget"]
    assert len(scene.world.fakes.prober.questions) == asked + 1, "by now it is known how much it would be"


@pytest.mark.parametrize("known", [True, False])
async def test_with_a_small_budget_a_stop_does_not_evict_what_it_has_just_written(known: bool, scene: Scene) -> None:
    if known:  # how much a token takes
        scene.engine.slots[0] = list(range(300))
        await scene.save()
        scene.another_launch()
        await scene.restore()
        scene.told.clear()
    scene.set(disk_bytes=700 * BYTES_PER_TOKEN)
    scene.store.put("q", name_of(KEY, 0, 300), 150_000)
    scene.engine.slots = {0: list(range(300)), 1: list(range(1000, 1500))}
    await scene.save()
    assert scene.store.names() == sorted([name_of(KEY, 0, 300), name_of(KEY, 1, 500)])
    assert [file.pool_id for file in scene.store.all()] == ["q", "p"], "nothing goes for what does not come"
    assert scene.types() == ["cache_lost", "cache_saved"] and scene.reasons() == ["budget"]
    assert "slot 0 was not saved" in scene.told[0][1] and "taken by other slots of this stop" in scene.told[0][1]
    assert scene.told[1][2]["slots"] == 1 and scene.told[1][2]["bytes"] == 500_000


async def test_what_another_pool_took_the_room_of_before_the_stop_was_over_is_not_said_to_be_saved(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = scene.store.complete

    def then_gone(pool_id: str, name: str, final: str, size_bytes: int) -> None:
        complete(pool_id, name, final, size_bytes)
        if final == name_of(KEY, 0, 300):  # the last one
            del scene.store.files["p", name_of(KEY, 1, 500)]

    monkeypatch.setattr(scene.store, "complete", then_gone)
    scene.engine.slots = {0: list(range(300)), 1: list(range(1000, 1500))}
    await scene.save()
    assert scene.reasons() == ["budget"] and "slot 1 was saved, and made room" in scene.told[0][1]
    assert scene.told[-1][0] == "cache_saved" and (scene.told[-1][2]["slots"], scene.told[-1][2]["tokens"]) == (1, 300)


async def test_all_that_was_lost_is_in_the_status(scene: Scene) -> None:
    scene.engine.slots = {0: list(range(300)), 1: list(range(1000, 1500))}
    await scene.save()
    scene.another_launch()
    scene.engine.fails["/slots/0"] = ValueError("the engine answered 400")
    scene.engine.fails["/slots/1"] = ValueError("the engine answered 500")
    lost = (await scene.restore()).lost
    assert lost == "slot 0 was not restored: the engine answered 400; slot 1 was not restored: the engine answered 500"


async def test_a_full_disk_is_said_and_harms_nothing(scene: Scene) -> None:
    scene.store.free = 0
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    assert scene.store.names() == [] and scene.reasons() == ["budget"]


@pytest.mark.parametrize(
    "problem",
    [ValueError("the engine answered 501: not supported"), aiohttp.ServerDisconnectedError(), ConnectionResetError("reset")],
)
@pytest.mark.parametrize("where", ["/slots", "action=save"])
async def test_an_engine_that_will_not_save_is_stopped_all_the_same(where: str, problem: Exception, scene: Scene) -> None:
    scene.engine.slots[0] = list(range(500))
    scene.engine.fails[where] = problem
    await scene.save()
    assert scene.store.names() == [] and scene.reasons() == ["error"]


@pytest.mark.parametrize("where", ["action=restore", "/completion"])
async def test_a_file_that_was_tried_in_vain_is_never_tried_again(where: str, scene: Scene) -> None:
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    scene.another_launch()
    scene.engine.fails[where] = aiohttp.ServerDisconnectedError()
    assert (await scene.restore()).slots == 0
    assert scene.store.names() == [] and scene.reasons() == ["error"]


async def test_a_slot_that_fails_takes_no_other_with_it(scene: Scene) -> None:
    scene.engine.slots = {0: list(range(300)), 1: list(range(1000, 1500))}
    await scene.save()
    scene.another_launch()
    scene.engine.fails["/slots/0"] = ValueError("the engine answered 400: invalid slot save file")
    found = await scene.restore()
    assert (found.slots, found.tokens) == (1, 500) and "invalid slot save file" in found.lost


async def test_what_an_earlier_save_left_unfinished_is_removed(scene: Scene) -> None:
    scene.store.put("p", temporary_name(3, 0), 10)
    scene.store.put("p", "something else", 10)
    await scene.restore()
    assert scene.store.names() == []


async def test_a_file_of_a_slot_that_there_cannot_be_is_removed(scene: Scene) -> None:
    """It would count against the budget for ever. One of an engine that had more slots stays: a reload may be undone."""
    more = name_of(KEY | {"slots": "8"}, 7, 300)
    planted = [name_of(KEY, 2, 300), name_of(KEY | {"model": "x"}, 9, 1), "slot-0-1" + "-0123456789ab" * 6 + ".kv"]
    for name in (more, *planted):
        scene.store.put("p", name, 1000)
    await scene.restore()
    assert scene.store.names() == [more]


async def test_a_later_save_takes_the_place_of_the_one_before(scene: Scene) -> None:
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    scene.engine.slots[0] = list(range(600))
    await scene.save()
    assert scene.store.names() == [name_of(KEY, 0, 600)]


async def test_a_disk_that_does_not_answer_as_it_should_is_told(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise NodeError("cannot use /run: Input/output error")

    monkeypatch.setattr(scene.store, "all", broken)
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    assert scene.reasons() == ["error"] and "Input/output error" in scene.told[-1][1]


async def test_why_an_engine_keeps_nothing_is_said_once(scene: Scene) -> None:
    scene.world.p.launch = type(scene.world.p.launch)(
        1, prepared=PreparedEngine("p", "/engine", slots=SlotSaving(unable="this build does not know the flag"))
    )  # fmt: skip
    for _ in range(2):
        scene.caches.launching(scene.world.p, scene.emit)
        await scene.save()
        assert await scene.restore() == Restored()
    assert [human for _, human, _ in scene.told] == [
        "What pool 'p' has read is not kept over its stops: this build does not know the flag"
    ]


async def test_what_was_kept_goes_when_nobody_wants_it_kept_any_more(scene: Scene) -> None:
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    scene.world.p.launch = type(scene.world.p.launch)(2, prepared=PreparedEngine("p", "/engine"))
    scene.caches.launching(scene.world.p, scene.emit)
    for _ in range(200):
        if not scene.store.names():
            break
        await asyncio.sleep(0)
        await asyncio.to_thread(lambda: None)
    assert scene.store.names() == [] and scene.types() == ["cache_saved"]


async def test_nothing_is_saved_that_is_about_to_be_deleted(scene: Scene) -> None:
    scene.engine.slots[0] = list(range(500))
    with scene.caches.unwanted("p"):
        await scene.save()
    assert scene.store.names() == [] and scene.told == []
    await scene.save()
    assert len(scene.store.names()) == 1, "and afterwards it is as ever"


async def test_an_engine_whose_successor_keeps_nothing_leaves_nothing(scene: Scene) -> None:
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    old = scene.world.p
    launch = type(old.launch)(2, prepared=PreparedEngine("p", "/engine"))
    old.successor = Pool("p", old.definition, old.state, launch)
    scene.engine.slots[0] = list(range(600))
    await scene.save()
    assert scene.store.names() == [] and scene.types() == ["cache_saved"]
    old.successor.launch = type(old.launch)(2, prepared=old.launch.prepared)
    await scene.save()
    assert len(scene.store.names()) == 1


async def test_what_cannot_be_deleted_is_told_once_and_nothing_fails_for_it(scene: Scene) -> None:
    scene.store.put("p", "unfinished", 10)
    scene.store.put("q", stuck := name_of(KEY, 0, 300), 300_000)
    scene.store.stays = {"unfinished", stuck}
    scene.set(disk_bytes=700_000)
    scene.engine.slots[0] = list(range(500))
    await scene.save()
    scene.another_launch()
    assert (await scene.restore()).slots == 1
    assert [human for type_, human, _ in scene.told if type_ == "notice"] == [
        "cannot remove unfinished: Operation not permitted", f"cannot remove {stuck}: Operation not permitted"
    ]  # fmt: skip
    assert "cache_removed" not in scene.types(), "nothing has made room"


async def test_what_replaces_a_file_needs_no_room_beside_it(scene: Scene) -> None:
    scene.set(disk_bytes=700_000)
    scene.store.put("q", name_of(KEY, 0, 300), 100_000)
    for tokens in (500, 600):
        scene.engine.slots[0] = list(range(tokens))
        await scene.save()
    assert scene.types() == ["cache_saved", "cache_saved"] and len(scene.store.names()) == 2


async def test_an_engine_whose_files_were_changed_since_is_not_saved(scene: Scene) -> None:
    scene.engine.slots[0] = list(range(500))
    scene.world.p.launch = type(scene.world.p.launch)(
        1, prepared=scene.world.p.launch.prepared, outdated=("The model file is another one now",)
    )  # fmt: skip
    await scene.save()
    assert scene.store.names() == [] and scene.reasons() == ["different"]


# --- in the life of a pool ---


async def test_a_start_is_given_its_slots_back_before_it_is_ready_and_the_status_says_so(world: World) -> None:
    world.fakes.slots.found = Restored(1, 2003)
    world.fakes.slots.gate = asyncio.Event()
    await world.pools.change(world.p, "restart", ev.Restart(), "up")
    await settle()
    assert world.fakes.slots.asked[-1] == "save p" and world.fakes.launcher.processes[0].signals == []
    world.fakes.slots.gate.set()
    await settle()
    assert world.fakes.slots.asked == ["launch p", "restore p", "save p", "launch p", "restore p"]
    assert world.fakes.launcher.processes[0].signals == ["term"]
    assert world.p.launch.restored == Restored(1, 2003)
    clock = world.fakes.clock
    shown = status_of(world.p, world.fakes.registry, "home", clock.monotonic(), 0)
    assert shown["cache"] == {"restored_slots": 1, "restored_tokens": 2003, "lost": None}


async def test_work_on_slots_that_breaks_delays_neither_stop_nor_start(world: World) -> None:
    world.fakes.slots.broken = RuntimeError("a fault of our own")
    operation = await world.pools.change(world.p, "restart", ev.Restart(), "up")
    await settle()
    assert operation.status == "succeeded"
    assert world.fakes.types().count("cache_lost") == 2


async def test_a_prime_prompt_is_read_where_a_slot_is_left_for_it() -> None:
    made = World(pool={"prime_prompt": "You are a helpful assistant."})
    made.fakes.engines.slots = SAVING
    made.pools.add("p", made.config.pools[0])
    await made.pools.change(made.p, "start", ev.Start(), "up")
    await settle()
    scene = Scene(made)
    await scene.restore()
    assert made.fakes.prober.primed == ["You are a helpful assistant."] and scene.types() == ["primed"]
    scene.engine.slots = {0: list(range(300)), 1: list(range(300))}
    await scene.save()
    scene.another_launch()
    await scene.restore()
    assert len(made.fakes.prober.primed) == 1
    await made.pools.close()
