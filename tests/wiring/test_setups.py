"""What pools' starts would be refused for: engines may take their time to say it, and who waits is told so."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest

from pool_managerd.config import Config, PoolConfig
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import EngineError, PoolError
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.wiring import setups
from pool_managerd.wiring.setups import Setups
from tests.conftest import DEADLINE_S


class SlowEngines:
    """They answer when they are let; ``asked``: as soon as one is."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def problems(self, pool: PoolConfig, model_path: str | None) -> tuple[PoolError, ...]:
        self.asked.set()
        assert self.may_answer.wait(DEADLINE_S)
        return (EngineError(f"cannot use --frob of {pool.id}"),)


@pytest.fixture
def engines() -> SlowEngines:
    return SlowEngines()


def setups_with(engines: SlowEngines, folder: Path, told: list[str]) -> Setups:
    pool = {"engine": "vllm", "model": f"file:{folder}", "provisioning": {"mode": "binary", "binary": {"path": "/bin/true"}}}
    (folder / "config.json").write_text("{}")
    config = Config.model_validate({"profile": "dev", "pools": [{"id": name, **pool} for name in ("big", "small")]})

    def tell(said: str) -> None:
        told.append(said)
        engines.may_answer.set()

    return Setups(config, ModelProvisioner(folder, config.policy), cast("EngineProvisioner", engines), tell)


def test_a_slow_engine_is_waited_for_and_who_waits_is_told_so_once(
    engines: SlowEngines, open_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setups, "FOLDER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(setups, "TOLD_AFTER_S", 0.1)
    told: list[str] = []
    found = setups_with(engines, open_dir, told).problems()
    assert {message for _, message, _ in found} >= {"cannot use --frob of big", "cannot use --frob of small"}
    assert told == ["still asking the engine of pools big, small what it knows, for 120 s at most"]


def test_an_engine_that_never_answers_is_given_up(engines: SlowEngines, open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setups, "FOLDER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(setups, "ENGINE_TIMEOUT_S", 0.2)
    told: list[str] = []
    found = setups_with(engines, open_dir, told).problems()
    engines.may_answer.set()
    assert (engines.asked.is_set(), told) == (True, []), "it was not long enough to be told"
    assert {message for _, message, _ in found if "frob" not in message} == {
        "cannot load its engine: it gave no answer within 0.2 s"
    }
