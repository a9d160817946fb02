"""The preflight before a start, as the node wires it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool_managerd.config import Config
from pool_managerd.core.preflight import HostFacts
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import NodeError
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.store.state import StateStore
from pool_managerd.testing.fake_parts import FakeNode
from pool_managerd.wiring.gpu_parts import GpuParts, PreflightMeans
from tests.core.gpus import gpu


async def test_a_start_before_anybody_looked_at_the_gpus_is_checked_with_them(tmp_path: Path) -> None:
    fakes = FakeNode()
    pools = [{"id": "a", "engine": "llamacpp", "model": "file:m.gguf"}]
    config = Config.model_validate({"pools": pools})
    engines = EngineProvisioner(config, PortAllocator("8080-8999"))
    means = PreflightMeans(frozenset, ModelProvisioner(tmp_path, config.policy), engines)
    parts = GpuParts(config, fakes.clock, fakes.events, StateStore(tmp_path), means)
    parts.watch = fakes.watch
    parts._facts = fakes.clock.monotonic(), HostFacts(tools={"nvidia-smi": "/usr/bin/nvidia-smi"})
    fakes.monitor.show(gpu(0, 24))
    assert fakes.monitor.scans == 0
    with pytest.raises(NodeError, match="/dev/nvidia-uvm is missing"):
        await parts.require("a")
    assert fakes.monitor.scans == 1
