"""Downloads that are killed, on the way and before each of their operations on files: the next one brings what is missing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.models.cache import ModelCache
from pool_managerd.models.leftovers import Leftovers
from tests.conftest import REPOSITORY, wait_until
from tests.faults.conftest import ALL
from tests.faults.download_checks import only_right_files, part_bytes, watch
from tests.faults.download_proxy import held_after
from tests.faults.download_sources import KINDS, TOKEN, Source, Tls, source
from tests.models.test_buckets import KEYS

KILLED = -9
STRIDE = 12
"""So many operations lie between the kills of a quick run."""


@contextmanager
def beside(kind: str, tls: Tls) -> Iterator[Source]:
    """A source in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    served = source(kind, tls)
    try:
        found = asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(20)
        try:
            yield found
        finally:
            asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class Downloads:
    """Processes that fetch ``s`` into ``folder``, one after the other."""

    def __init__(self, s: Source, folder: Path, tls: Tls, **env: str) -> None:
        self.root = folder / "cache"
        words = (s.proxy.url, TOKEN, str(tls.file), str(folder), s.ref, s.digest or "")
        argv = (sys.executable, "-m", "tests.faults.download_child", *words)
        own = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": s.proxy.url, "PYTHONPATH": str(REPOSITORY), **env}
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=own)

    def start(self, kill_before: int = 0) -> int:
        """Its pid. ``kill_before``: the number of an operation."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kill_before}\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> tuple[int, str]:
        """How it has ended, and what it said."""
        said = self._line()
        return (KILLED, "") if said == str(KILLED) else (int(self._line()), said)

    def finish(self) -> tuple[int, Path]:
        """One that is not killed: how many operations it took, and where the model is."""
        self.start()
        code, said = self.end()
        count, _, path = said.partition(" ")
        assert code == 0 and count.isdecimal(), said
        return int(count), Path(path)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


@contextmanager
def downloads(s: Source, folder: Path, tls: Tls, count: int = 1, **env: str) -> Iterator[list[Downloads]]:
    made = [Downloads(s, folder, tls, **env) for _ in range(count)]
    with ExitStack() as stack:
        for one in made:
            stack.callback(one.close)
        yield made


def complete(s: Source, root: Path) -> None:
    """The model is there and right; what a killed one has left beside it is known to be of no use, and goes."""
    only_right_files(s, root)
    cache = ModelCache(root)
    assert cache.find(s.ref) is not None
    leftovers = Leftovers(cache)
    for leftover in leftovers.look((), keep=False):
        assert leftover.kind in ("temporary", "download") and not leftover.users, leftover
        leftovers.remove(leftover)
    assert list((root / "partial").iterdir()) == [] and not list((root / "refs").glob("*.new"))


def slow_but_for(*kinds: str) -> list[Any]:
    return [pytest.param(kind, marks=() if kind in kinds else pytest.mark.slow) for kind in KINDS]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", slow_but_for("hf"))
def test_killed_before_any_of_its_operations_the_next_one_brings_no_more_than_what_is_missing(
    kind: str, tls: Tls, tmp_path: Path
) -> None:
    with beside(kind, tls) as s:
        watch(s, tmp_path / "cache")
        number, stride = 1, 1 if os.environ.get(ALL) == "all" else STRIDE
        with downloads(s, tmp_path, tls) as (one,):
            while True:
                one.start(number)
                code, said = one.end()
                if code != KILLED:
                    break
                only_right_files(s, one.root)
                there, before = part_bytes(one.root, s.proxy.hit), len(s.proxy.asked)
                one.finish()
                assert len(s.proxy.asked) <= before + 1 and s.proxy.asked[before:] in ([], [there])
                complete(s, one.root)
                ModelCache(one.root).remove(s.ref)
                number += stride
            assert not said.startswith("failed") and number > 40, said


@pytest.mark.parametrize("kind", slow_but_for())
def test_killed_anywhere_on_the_way_the_next_one_goes_on_behind_what_is_there(kind: str, tls: Tls, tmp_path: Path) -> None:
    with beside(kind, tls) as s, downloads(s, tmp_path, tls) as (one,):
        for percent in (10, 30, 50, 70, 90):
            s.proxy.asked.clear()
            killed_at(one, s, len(s.body) * percent // 100)
            one.finish()
            complete(s, one.root)
            assert len(s.proxy.asked) == 2 and s.proxy.asked[1] > 0
            ModelCache(one.root).remove(s.ref)


@pytest.mark.parametrize("kind", slow_but_for())
def test_who_waits_for_a_process_that_is_killed_takes_its_work_over(kind: str, tls: Tls, tmp_path: Path) -> None:
    with beside(kind, tls) as s, downloads(s, tmp_path, tls, 2) as (one, two):
        killed_at(one, s, len(s.body) // 2, waiting=two)
        code, said = two.end()
        assert code == 0 and not said.startswith("failed"), said
        complete(s, one.root)
        assert len(s.proxy.asked) == 2 and s.proxy.asked[1] > 0


@pytest.mark.parametrize("kind", slow_but_for())
def test_two_processes_whose_locks_lie_bring_no_wrong_file_when_one_is_killed(kind: str, tls: Tls, tmp_path: Path) -> None:
    with beside(kind, tls) as s, downloads(s, tmp_path, tls, 2, LYING_LOCKS="1") as (one, two):
        s.proxy.faults = [held_after(len(s.body) // 2)]
        pid = one.start()
        wait_until(lambda: part_bytes(one.root, s.proxy.hit) > 0, "some of it")
        two.start()
        code, _ = two.end()
        assert code == 0
        only_right_files(s, one.root)
        os.kill(pid, 9)
        assert one.end()[0] == KILLED
        only_right_files(s, one.root)
        one.finish()
        only_right_files(s, one.root)


def killed_at(one: Downloads, s: Source, offset: int, waiting: Downloads | None = None) -> None:
    watch(s, one.root)
    s.proxy.faults = [held_after(offset)]
    pid = one.start()
    wait_until(lambda: part_bytes(one.root, s.proxy.hit) > max(0, offset - 80_000), "as much of it")
    if waiting is not None:
        waiting.start()
    os.kill(pid, 9)
    assert one.end()[0] == KILLED
    only_right_files(s, one.root)
