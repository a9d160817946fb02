"""The daemon's file: read, tried out, replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pool_managerd.config.source import ConfigSource
from pool_managerd.errors import NodeError, SpecError


@pytest.fixture
def source(tmp_path: Path) -> ConfigSource:
    path = tmp_path / "pm.yaml"
    path.write_text("profile: dev\n")
    path.chmod(0o640)
    return ConfigSource(path, {"POOL_MANAGERD__GPU__OVERHEAD_MIB": "7"}, {"daemon.bind": "127.0.0.1:1"})


def test_a_text_means_what_the_file_with_it_would(source: ConfigSource) -> None:
    config = source.load("profile: home\n")
    assert (config.profile, config.gpu.overhead_mib, config.daemon.bind) == ("home", 7, "127.0.0.1:1")
    assert config.base_dir == source.path.parent and source.load(source.text()).profile == "dev"
    with pytest.raises(SpecError, match=r"pm\.yaml:1:1"):
        source.load("nonsense: 1\n")


def test_it_is_replaced_with_owner_and_mode_and_nothing_is_left_beside_it(source: ConfigSource) -> None:
    before = source.seen()
    source.replace("profile: cloud\n")
    assert source.text() == "profile: cloud\n" and source.seen() != before
    assert stat.S_IMODE(source.path.stat().st_mode) == 0o640
    assert [entry.name for entry in source.path.parent.iterdir()] == ["pm.yaml"]


def test_a_link_stays_one(source: ConfigSource, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(source.path)
    ConfigSource(link, {}).replace("profile: home\n")
    assert link.is_symlink() and source.text() == "profile: home\n"


def test_what_cannot_be_written_stays_as_it_was_and_says_what_to_do(
    source: ConfigSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NodeError, match="No space left on device") as refused:
        source.replace("profile: cloud\n")
    assert refused.value.code == "CONFIG_UNWRITABLE" and "pool-managerd apply" in str(refused.value.hint)
    assert source.text() == "profile: dev\n" and len(list(source.path.parent.iterdir())) == 1


def test_one_that_is_gone_is_not_made(source: ConfigSource) -> None:
    source.path.unlink()
    assert source.seen() is None
    with pytest.raises(NodeError, match="cannot write"):
        source.replace("profile: dev\n")
    with pytest.raises(SpecError, match="cannot read it"):
        source.text()
    source.replace("profile: dev\n", gone_too=True)
    assert source.text() == "profile: dev\n" and stat.S_IMODE(source.path.stat().st_mode) == 0o600, "but where it is asked for"
