from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.host.simulation import build_simulated_driver
from tests.gpu.nodes import GpuNode, Json, pool, scripted

MakeNode = Callable[..., GpuNode]
MakePool = Callable[..., Json]


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the simulated libnvidia-ml.so.1."""
    return build_simulated_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def make_node(open_dir: Path, driver_library: Path) -> Iterator[MakeNode]:
    """Daemons on simulated GPUs that end with the test: ``make_node(topology, *lines, pools=[…])``."""
    made: list[GpuNode] = []

    def make(text: str, *lines: str, **options: Any) -> GpuNode:
        made.append(GpuNode(open_dir / f"node-{len(made)}", driver_library, text, *lines, **options))
        return made[-1]

    yield make
    for node in made:
        node.end()


@pytest.fixture
def fake(open_dir: Path, tiny_model: Path) -> MakePool:
    """Configured pools whose engine is the scripted one: ``fake("a", devices=[0], gib=10)``. ``script`` has its flags."""

    def make(pool_id: str, script: tuple[str, ...] = (), **keys: Any) -> Json:
        return pool(pool_id, tiny_model, scripted(open_dir, *script, name=f"engine-{pool_id}"), **keys)

    return make


@pytest.fixture
def real(tiny_model: Path, llama_server: Path) -> MakePool:
    """Configured pools that a real llama-server runs."""

    def make(pool_id: str, **keys: Any) -> Json:
        return pool(pool_id, tiny_model, llama_server, **keys)

    return make
