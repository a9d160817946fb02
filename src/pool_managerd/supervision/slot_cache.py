"""Keeping what engines have read of their prompts over a stop: saved before it, given back before the next launch is ready.

A file is given back once, and removed then, whatever came of it: one that ends its engine must not end every launch after it,
and what was said lies on disk only while nobody has it in memory. What an engine says of a restore is not believed: it is
asked the same prompt once more, and how many tokens of it it had tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import aiohttp

from pool_managerd.config import Config
from pool_managerd.core.artifacts import AnyEngine, PreparedEngine
from pool_managerd.core.narration import count, size
from pool_managerd.core.slot_cache import (
    Restored,
    SlotFile,
    SlotSaving,
    SlotState,
    differences,
    holds_enough,
    name_of,
    proven,
    restorable,
    slot_of,
    temporary_name,
    worth_saving,
)
from pool_managerd.core.slot_dialect import SlotDialect
from pool_managerd.errors import PoolError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Clock, Emit, Engines, Prober, SlotStore
from pool_managerd.supervision.slot_disk import SlotDisk

PROOF_S = 15.0
"""An engine that has the tokens answers with the time of one; one that has not is not let compute them all."""
_TROUBLE = (aiohttp.ClientError, OSError, ValueError, PoolError)


class NotKeptError(Exception):
    """Why a slot is not saved, or not restored; ``reason`` is the word for it in metrics."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass(frozen=True)
class _Turn:
    """One launch whose slots are saved or restored: what was ``saved``, (tokens, bytes) by file, and what was ``lost``."""

    pool: Pool
    engine: PreparedEngine
    saving: SlotSaving
    dialect: SlotDialect
    emit: Emit
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


class SlotCaches:
    """Of all pools of a node."""

    def __init__(self, files: SlotStore, engines: Engines, prober: Prober, clock: Clock, config: Callable[[], Config]) -> None:
        self._files, self._engines, self._prober, self._clock, self._config = files, engines, prober, clock, config
        self._disk = SlotDisk(files, config)
        self._useless: set[tuple[tuple[str, str], ...]] = set()
        """Keys of engines that were given slots back and had nothing of them."""
        self._per_token: dict[tuple[tuple[str, str], ...], float] = {}
        self._told: set[tuple[str, str]] = set()
        self._missed: dict[str, list[str]] = {}
        """By pool, what was not saved at its last stop."""
        self._forgetting: set[asyncio.Task[None]] = set()
        self._unwanted: set[str] = set()

    def launching(self, pool: Pool, emit: Emit) -> None:
        """Say why this launch keeps nothing of its slots, once; where nobody wants it to, what was kept before is removed."""
        engine = pool.launch.prepared
        if _keeps_nothing(engine):
            task = asyncio.create_task(self._disk.forget(pool.pool_id, emit))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)
        why = engine.slots.unable if isinstance(engine, PreparedEngine) and engine.slots is not None else ""
        if why and (pool.pool_id, why) not in self._told:
            self._told.add((pool.pool_id, why))
            emit("notice", f"What pool '{pool.pool_id}' has read is not kept over its stops: {why}")

    @contextmanager
    def unwanted(self, pool_id: str) -> Iterator[None]:
        """What is saved of it is about to be deleted: a stop meanwhile saves nothing."""
        self._unwanted.add(pool_id)
        try:
            yield
        finally:
            self._unwanted.discard(pool_id)

    # --- saving ---

    async def save(self, pool: Pool, emit: Emit) -> None:
        """What is worth it, the largest first, within ``slot_cache.save_timeout_ms``. Where the engine that has taken this one's
        place keeps nothing, what is there is removed instead.
        """
        turn, newest = self._turn(pool, emit), pool.latest()
        self._missed.pop(pool.pool_id, None)
        if turn is None or _named(turn.saving) in self._useless or pool.pool_id in self._unwanted:
            return
        if newest is not pool and _keeps_nothing(newest.launch.prepared):
            await self._disk.forget(pool.pool_id, emit)
            return
        self._missed[pool.pool_id] = turn.lost
        if pool.launch.outdated:
            self._lost(turn, "different", "its slots are not saved: what it was started from was changed since")
            return
        began, limit_s = self._clock.monotonic(), pool.definition.policy.save_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                for state in await self._states(turn):
                    await self._told_if_not(turn, self._save(turn, state), "saved", state.slot)
        except TimeoutError:
            self._lost(turn, "timeout", f"what its slots hold was not saved within {limit_s:g} s (slot_cache.save_timeout_ms)")
        except _TROUBLE as problem:
            self._lost(turn, "error", f"what its slots hold was not saved: {_words(problem)}")
        await self._say_saved(turn, began)

    async def _say_saved(self, turn: _Turn, began: float) -> None:
        """What is there at the end: another pool that stops at the same time may have needed its room."""
        pool_id = turn.pool.pool_id
        try:
            there = {file.name for file in await asyncio.to_thread(self._files.of, pool_id)} if turn.saved else set()
        except _TROUBLE as problem:
            self._lost(turn, "error", f"whether its slots are saved is not known: {_words(problem)}")
            return
        for name in turn.saved.keys() - there:
            self._lost(turn, "budget", f"slot {(slot_of(name) or (0, 0))[0]} was saved, and made room for another pool's since")
        if done := [numbers for name, numbers in turn.saved.items() if name in there]:
            tokens, written = (sum(numbers) for numbers in zip(*done, strict=True))
            took_ms = round((self._clock.monotonic() - began) * 1000)
            human = f"Saved {count(len(done), 'slot')} of pool '{pool_id}': {tokens} tokens, {size(written)}, in {took_ms} ms"
            turn.emit("cache_saved", human, slots=len(done), tokens=tokens, bytes=written, duration_ms=took_ms)

    async def _states(self, turn: _Turn) -> list[SlotState]:
        """The slots that are worth it; one that would be, and has a request, is told of."""
        await self._disk.tidy(turn.pool.pool_id, turn.emit)
        answer = await self._prober.ask(turn.engine.url, turn.dialect.list_slots())
        least = self._config().slot_cache.min_tokens
        states = turn.dialect.slots(answer)
        for state in states:
            if state.busy and holds_enough(state, least):
                self._lost(turn, "busy", f"slot {state.slot} was not saved: it had a request when it was stopped")
        return sorted((state for state in states if worth_saving(state, least)), key=lambda state: -(state.tokens or 0))

    async def _save(self, turn: _Turn, state: SlotState) -> None:
        pool_id, key = turn.pool.pool_id, turn.saving.key
        temporary = temporary_name(turn.pool.instance.epoch, state.slot)
        writing = (pool_id, temporary)
        await self._make_room(turn, state, writing)
        kept = False
        try:
            answer = await self._prober.ask(turn.engine.url, turn.dialect.save(state.slot, temporary))
            tokens, written = turn.dialect.saved(answer)
            if tokens < self._config().slot_cache.min_tokens:
                return
            if not written:
                raise NotKeptError("error", "the engine wrote nothing of it")
            self._per_token[_named(turn.saving)] = written / tokens
            self._disk.writing.pop(writing)
            files = await asyncio.to_thread(self._files.all)
            before = [file for file in files if _is_of(file, pool_id, state.slot, key)]
            others = [file for file in files if file not in before and (file.pool_id, file.name) != writing]
            if (room := self._disk.room(pool_id, written, others, turn.saved, on_disk=written)).why_not:
                raise NotKeptError("budget", room.why_not)
            for file in before:
                await self._disk.remove(file, turn.emit)
            name = name_of(key, state.slot, tokens)
            await asyncio.to_thread(self._files.complete, pool_id, temporary, name, written)
            turn.saved[name] = (tokens, written)
            kept = True
            await self._disk.give_room(pool_id, room.remove, turn.emit)
        finally:
            self._disk.writing.pop(writing, None)
            if not kept:
                self._disk.remove_at_once(SlotFile(pool_id, temporary, 0, 0.0), turn.emit)

    async def _make_room(self, turn: _Turn, state: SlotState, writing: tuple[str, str]) -> None:
        """For what it will be, as far as that is known; what it replaces goes afterwards, by itself."""
        need, own = round((state.tokens or 0) * self._bytes_per_token(turn)), (turn.pool.pool_id, state.slot, turn.saving.key)
        files = [file for file in await asyncio.to_thread(self._files.all) if not _is_of(file, *own)]
        if (room := self._disk.room(turn.pool.pool_id, need, files, turn.saved)).why_not:
            raise NotKeptError("budget", room.why_not)
        self._disk.writing[writing] = need
        await self._disk.give_room(turn.pool.pool_id, room.remove, turn.emit)

    def _bytes_per_token(self, turn: _Turn) -> float:
        """As it was the last time; before there was one, as the memory of a launch is estimated; 0 where nobody knows."""
        if (known := self._per_token.get(_named(turn.saving))) is not None:
            return known
        sizing, allocation = turn.pool.launch.sizing, turn.pool.launch.allocation
        if sizing is None or not turn.engine.ctx:
            return 0.0
        devices = 0 if allocation is None else len(allocation.devices)
        return sizing.estimate(devices).kv.size_bytes / turn.engine.ctx

    # --- restoring ---

    async def restore(self, pool: Pool, emit: Emit) -> Restored:
        """What fits this launch and is proven, and the prime prompt where a slot is left for it."""
        began, limit_s = self._clock.monotonic(), pool.definition.policy.restore_timeout_s
        missed = self._missed.pop(pool.pool_id, [])
        found, turn = Restored(), self._turn(pool, emit)
        if turn is not None:
            found = (await self._restore_all(turn, limit_s)).telling([*missed, *turn.lost])
        if found.slots:
            took_ms = round((self._clock.monotonic() - began) * 1000)
            what = f"{count(found.slots, 'slot')} of pool '{pool.pool_id}'"
            human = f"Restored {what}: {found.tokens} tokens, proven, in {took_ms} ms"
            emit("cache_restored", human, slots=found.slots, tokens=found.tokens, duration_ms=took_ms)
        await self._prime(pool, emit, found, limit_s - (self._clock.monotonic() - began))
        return found

    async def _restore_all(self, turn: _Turn, limit_s: float) -> Restored:
        """A file that was tried is removed; one that the daemon's own end kept from it is there for the next."""
        found, pool_id, fitting = Restored(), turn.pool.pool_id, dict[int, SlotFile]()
        try:
            async with asyncio.timeout(limit_s):
                await self._disk.tidy(pool_id, turn.emit)
                files = await asyncio.to_thread(self._files.of, pool_id)
                fitting = restorable(files, turn.saving.key, turn.engine.slots_total)
                self._say_what_does_not_fit(turn, files)
                for slot, file in sorted(fitting.items()):
                    given = await self._told_if_not(turn, self._restore(turn, slot, file), "restored", slot)
                    await self._disk.remove(file, turn.emit)
                    if given:
                        tokens = (slot_of(file.name) or (0, 0))[1]
                        found = replace(found, slots=found.slots + 1, tokens=found.tokens + tokens)
        except TimeoutError:
            for file in fitting.values():
                await self._disk.remove(file, turn.emit)
            self._lost(turn, "timeout", f"it was not given back within {limit_s:g} s (slot_cache.restore_timeout_ms)")
        except _TROUBLE as problem:
            self._lost(turn, "error", f"it was not given back: {_words(problem)}")
        return found

    async def _restore(self, turn: _Turn, slot: int, file: SlotFile) -> None:
        """Raises NotKeptError when the engine does not have it then."""
        url, dialect, (_, tokens) = turn.engine.url, turn.dialect, slot_of(file.name) or (0, 0)
        head = await asyncio.to_thread(self._files.head, file.pool_id, file.name, dialect.head_bytes(tokens))
        saved = dialect.tokens(head, tokens)
        dialect.restored(await self._prober.ask(url, dialect.restore(slot, file.name)))
        try:
            async with asyncio.timeout(PROOF_S):
                cached = dialect.cached(await self._prober.ask(url, dialect.ask_again(slot, saved)))
        except TimeoutError:
            raise NotKeptError("unproven", f"it did not answer the same prompt within {PROOF_S:g} s") from None
        if not proven(len(saved), cached):
            self._useless.add(_named(turn.saving))
            why = f"the engine said that it was, and had {cached} of {len(saved)} tokens; it is not asked to save any more"
            raise NotKeptError("unproven", why)

    def _say_what_does_not_fit(self, turn: _Turn, files: list[SlotFile]) -> None:
        """Once per file: it stays as long as there is room, for a reload that is undone."""
        pool_id, others, parts = turn.pool.pool_id, list[SlotFile](), dict[str, None]()
        for file in files:
            if different := differences(turn.saving.key, file.name):
                others.append(file)
                parts |= dict.fromkeys(different)
        if not others:
            return
        why = f"{count(len(others), 'saved slot')} of it cannot be used: another {' and '.join(parts)} than when saved"
        if any((pool_id, file.name) not in self._told for file in others):
            self._told |= {(pool_id, file.name) for file in others}
            self._lost(turn, "different", why)
        else:
            turn.lost.append(why)

    async def _prime(self, pool: Pool, emit: Emit, found: Restored, left_s: float) -> None:
        """In a slot that nothing was given back to."""
        prompt, engine = pool.config.prime_prompt if pool.config is not None else None, pool.launch.prepared
        if prompt is None or engine is None or found.slots >= engine.slots_total or left_s <= 0:
            return
        try:
            took_ms = await self._prober.prime(engine, prompt, left_s)
        except TimeoutError:
            emit("notice", f"Pool '{pool.pool_id}' did not read its prime prompt within {left_s:.0f} s", level="warn")
        except _TROUBLE as problem:
            emit("notice", f"Pool '{pool.pool_id}' did not read its prime prompt: {_words(problem)}", level="warn")
        else:
            emit("primed", f"Pool '{pool.pool_id}' has read its prime prompt in {took_ms:.0f} ms", duration_ms=round(took_ms))

    # --- both ---

    def _turn(self, pool: Pool, emit: Emit) -> _Turn | None:
        """None for an engine that saves no slots; why it cannot is said once."""
        engine = pool.launch.prepared
        if not isinstance(engine, PreparedEngine) or engine.slots is None:
            return None
        dialect = self._engines.dialect(engine)
        return None if dialect is None else _Turn(pool, engine, engine.slots, dialect, emit)

    async def _told_if_not(self, turn: _Turn, work: Awaitable[None], what: str, slot: int) -> bool:
        """Why ``work`` has failed is told; the other slots have their turn all the same."""
        try:
            await work
        except TimeoutError:
            raise
        except NotKeptError as problem:
            reason, why = problem.reason, f"slot {slot} was not {what}: {problem}"
        except _TROUBLE as problem:
            reason, why = "error", f"slot {slot} was not {what}: {_words(problem)}"
        else:
            return True
        self._lost(turn, reason, why)
        return False

    def _lost(self, turn: _Turn, reason: str, why: str) -> None:
        turn.lost.append(why)
        turn.emit("cache_lost", f"Cache lost in pool '{turn.pool.pool_id}': {why}", level="warn", reason=reason)


def _is_of(file: SlotFile, pool_id: str, slot: int, key: Mapping[str, str]) -> bool:
    place = slot_of(file.name)
    return file.pool_id == pool_id and place is not None and place[0] == slot and not differences(key, file.name)


def _keeps_nothing(engine: AnyEngine | None) -> bool:
    """Nobody wants it to, as against one that is not able to."""
    return isinstance(engine, PreparedEngine) and engine.slots is None


def _named(saving: SlotSaving) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(saving.key.items()))


def _words(problem: Exception) -> str:
    return problem.message if isinstance(problem, PoolError) else str(problem) or type(problem).__name__
