"""What the registry is told of pools: what the configuration knows before any start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pool_managerd.config import PolicyConfig, PoolConfig
from pool_managerd.core.baselines import Baseline
from pool_managerd.core.lifecycle import Policy, PoolState
from pool_managerd.core.registry import PerfHints
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.pool import Definition, Pool
from pool_managerd.supervision.publishing import registry_fields


def told(launch: Launch | None = None, **config: Any) -> dict[str, Any]:
    definition = Definition(Policy(), PoolConfig(id="a", engine="llamacpp", **config))
    pool = Pool("a", definition, PoolState.new("a"), launch or Launch())
    return registry_fields(pool, 0, "node-1", ModelProvisioner(Path(), PolicyConfig()).id_of)


def test_what_is_configured_is_known_before_the_first_start() -> None:
    found = told(model="file:models/../m.gguf", devices=["GPU1", 0], ctx=4096, quant="Q4_K_M")
    assert (found["device_mask"], found["ctx_max"], found["quant"]) == ("1,0", 4096, "Q4_K_M")
    assert (found["model_id"], found["node_id"], found["replica_id"]) == ("file:m.gguf", "node-1", "r0")
    assert found["perf_hints"] == PerfHints(None, None, ("Q4_K_M",))
    free = told(model="m.gguf")
    assert (free["device_mask"], free["ctx_max"], free["quant"], free["model_id"]) == (None, None, None, "file:m.gguf")
    assert "perf_hints" not in free


@pytest.mark.parametrize("ref", ["hf:org/repo/f.gguf", "sha256:" + "0" * 64, "https://example.org/m.gguf"])
def test_a_model_that_is_no_file_is_known_by_its_reference(ref: str) -> None:
    assert told(model=ref)["model_id"] == ref


def test_a_quantisation_that_was_read_from_the_model_is_told_with_what_was_measured() -> None:
    sizing = SimpleNamespace(inputs=SimpleNamespace(shape=SimpleNamespace(quantization="Q8_0", ctx_train=8192)))
    launch = Launch(sizing=cast("Any", sizing), measured=(Baseline(5.0, 90.0, 2, "bench of 8 tokens, 2 runs", 7, {}),))
    found = told(launch, model="m.gguf")
    assert (found["quant"], found["perf_hints"]) == ("Q8_0", PerfHints(90.0, 5.0, ("Q8_0",), "bench of 8 tokens, 2 runs", 7))
