"""An engine is added by one file and one line: here is one that does not exist, from its configuration to its health."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pool_managerd import PoolManager, engines
from pool_managerd.config import Config, PoolConfig, json_schema
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.engines import ENGINES, EngineKind
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import SpecError
from pool_managerd.supervision.policy import policy_for
from pool_managerd.wiring.setups import setups_of
from tests.conftest import http_status

HERE = Path(__file__).resolve().parent
POOL: dict[str, Any] = {
    "id": "polly", "engine": "parrot", "model": "file:words.txt", "slots": 3,
    "provisioning": {"mode": "binary", "binary": {"path": sys.executable}, "flags": ["--token-ms", "2"]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def parrot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(HERE / "made_up")])  # the one file: parrot.py
    monkeypatch.setitem(ENGINES, "parrot", EngineKind(("binary", "external"), startup_ms=9_000, program="parrot"))


def test_its_name_may_be_configured_and_a_misspelt_one_is_told() -> None:
    assert PoolConfig.model_validate(POOL).engine == "parrot"
    assert json_schema()["$defs"]["PoolConfig"]["properties"]["engine"]["enum"] == [*ENGINES]
    with pytest.raises(ValidationError, match=r"'triton' or 'parrot' \(did you mean 'parrot'\?\)"):
        PoolConfig.model_validate(POOL | {"engine": "parot"})


async def test_its_pool_is_prepared_by_its_adapter(dev_config: Config) -> None:
    provisioner, pool = EngineProvisioner(dev_config, PortAllocator("21000-28999")), PoolConfig.model_validate(POOL)
    model = ResolvedModel("file:words.txt", "/words.txt")
    prepared = await provisioner.prepare(pool, model)
    assert (prepared.engine, prepared.engine_version, prepared.health_path) == ("parrot", "parrot-1", "/health")
    assert prepared.argv[-2:] == ("--token-ms", "2") and str(prepared.port) in prepared.flags
    assert provisioner.problems(pool, None) == ()
    assert policy_for(dev_config, pool.id, pool, "node").startup_timeout_s == 9
    container = PoolConfig.model_validate(POOL | {"provisioning": {"mode": "container"}})
    with pytest.raises(SpecError, match="cannot run parrot in mode container yet") as caught:
        await provisioner.prepare(container, model)
    assert str(caught.value.hint).startswith("use mode binary with provisioning.binary.path, or start it yourself")


async def test_it_runs_until_it_answers(open_dir: Path) -> None:
    (open_dir / "words.txt").write_text("Pieces of eight!")
    daemon = {"runtime_dir": open_dir / "run", "state_dir": open_dir / "state"}
    raw = {"profile": "dev", "base_dir": open_dir, "daemon": daemon, "pools": [POOL | {"preload": False}]}
    async with PoolManager(Config.model_validate(raw)) as node:
        status = await node.ensure_ready("polly")
        assert (status["engine"], status["slots_total"], status["ready"]) == ("parrot", 3, True)
        assert http_status(f"{status['url']}/health") == 200
        assert node.capabilities()["engines"]["parrot"] == ["binary", "external"]


async def test_a_line_without_its_file_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, dev_config: Config, open_dir: Path
) -> None:
    monkeypatch.setitem(ENGINES, "macaw", EngineKind(("binary", "external")))
    provisioner, pool = (
        EngineProvisioner(dev_config, PortAllocator("21000-28999")),
        PoolConfig.model_validate(POOL | {"engine": "macaw"}),
    )
    with pytest.raises(SpecError, match="cannot run macaw: it has no adapter") as refused:
        await provisioner.prepare(pool, ResolvedModel("file:words.txt", "/words.txt"))
    assert "engines/macaw.py" in str(refused.value.hint)


def test_an_adapter_that_breaks_is_a_finding_and_no_disk_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, open_dir: Path
) -> None:
    def broken(*_: object) -> tuple[object, ...]:
        raise ZeroDivisionError("boom")

    (open_dir / "words.txt").write_text("Pieces of eight!")
    config = Config.model_validate({"profile": "dev", "base_dir": open_dir, "pools": [POOL]})
    monkeypatch.setattr(EngineProvisioner, "problems", broken)
    ((pool_id, message, _),) = setups_of(config).problems()
    assert pool_id == "polly" and "an internal error" in message and "boom" in message


async def test_explain_says_what_a_start_would_say(open_dir: Path) -> None:
    daemon = {"runtime_dir": open_dir / "run", "state_dir": open_dir / "state"}
    async with PoolManager(Config.model_validate({"profile": "dev", "base_dir": open_dir, "daemon": daemon})) as node:
        await node.register("n")
        told = await node.explain("n")
        assert "would not start" in told["would"] and "neither a configuration nor a submitted engine" in told["blockers"][0]
