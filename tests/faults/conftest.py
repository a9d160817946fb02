"""A watched daemon for each row, and the oracle after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.watched import Watched, WatchedGpuNode
from tests.gpu.conftest import MakePool, driver_library, fake

__all__ = ["MakePool", "driver_library", "fake"]

Make = Callable[..., Watched]
MakeNode = Callable[..., WatchedGpuNode]
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    if outcome.get_result().failed:
        item.stash[_FAILED] = True


def _judge(made: list[Watched], request: pytest.FixtureRequest) -> None:
    broken = []
    try:
        if not request.node.stash.get(_FAILED, False):
            broken = [f"{one.folder.name}: {sentence}" for one in made if not one.judged for sentence in one.judge()]
    finally:
        for one in made:
            one.watch.end()
            one.end()
    assert not broken, "the oracle says: " + "; ".join(broken)


@pytest.fixture
def make(open_dir: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """``make(extra configuration, NAME=value …)``: daemons that are judged at the end of the test."""
    made: list[Watched] = []

    def daemon(extra: str = "", *, name: str = "d", **env: str) -> Watched:
        made.append(Watched(open_dir / name, extra, **env))
        return made[-1]

    yield daemon
    _judge(made, request)


@pytest.fixture
def daemon(make: Make) -> Watched:
    """One that runs."""
    return make().start()


@pytest.fixture
def make_node(open_dir: Path, driver_library: Path, request: pytest.FixtureRequest) -> Iterator[MakeNode]:
    """Daemons on simulated GPUs that are judged at the end of the test: ``make_node(topology, *lines, pools=[…])``."""
    made: list[Watched] = []

    def node(text: str, *lines: str, **options: Any) -> WatchedGpuNode:
        one = WatchedGpuNode(open_dir / f"node-{len(made)}", driver_library, text, *lines, **options)
        made.append(one)
        return one

    yield node
    _judge(made, request)
