"""What a start will need, read from whatever file its model is."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.engines.llamacpp.memory import build_of
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.wiring.launch_sizer import StartSizer


def sizer(folder: Path, profile: str = "dev") -> StartSizer:
    config = Config.model_validate({"profile": profile, "base_dir": folder})
    engines = EngineProvisioner(config, PortAllocator("8080-8999"), has_gpu=lambda: False)
    return StartSizer(config, ModelProvisioner(folder, config.policy), engines)


async def facts(folder: Path, model: str, *flags: str) -> LaunchInputs:
    pytest.importorskip("xllamacpp")
    pool = {"id": "p", "engine": "llamacpp", "model": model, "provisioning": {"mode": "package", "flags": flags}}
    return await sizer(folder)(PoolConfig.model_validate(pool), None)


@pytest.mark.parametrize("name", ["m.gguf", "sha256-" + "a" * 64, "b" * 64, "m.bin", "M.GGUF.part"])
async def test_a_gguf_model_is_sized_by_its_header_whatever_it_is_called(tmp_path: Path, tiny_model: Path, name: str) -> None:
    shutil.copy(tiny_model, tmp_path / name)
    found = await facts(tmp_path, f"file:{name}")
    assert found.shape is not None and (found.shape.architecture, found.shape.n_layers) == ("llama", 2)
    submitted = PreparedEngine("p", "/engine", model_path=str(tmp_path / name))
    assert (await sizer(tmp_path)(None, submitted)).shape == found.shape


async def test_safetensors_without_a_suffix_are_sized_by_their_header(tmp_path: Path) -> None:
    head = json.dumps({"model.embed_tokens.weight": {"dtype": "F16", "shape": [4, 2], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "blob").write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
    submitted = PreparedEngine("p", "/engine", engine="vllm", model_path=str(tmp_path / "blob"))
    found = (await sizer(tmp_path)(None, submitted)).shape
    assert found is not None and found.weights_bytes == 16


@pytest.mark.parametrize(
    ("version", "build"),
    [("llamacpp-b9272-571d0d5", 9272), ("b3200", 3200), ("xllamacpp-0.2.1", None), ("unknown", None), ("web100", None)],
)
async def test_old_builds_are_sized_as_old_builds(tmp_path: Path, tiny_model: Path, version: str, build: int | None) -> None:
    assert build_of(version) == build
    submitted = PreparedEngine("p", "/engine", model_path=str(tiny_model), engine_version=version)
    settings = (await sizer(tmp_path)(None, submitted)).settings
    assert isinstance(settings, EngineSettings) and settings.all_logits == (build is not None)
