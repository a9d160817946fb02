from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pool_managerd.config import PoolConfig
from pool_managerd.config.changes import differences, digest_of, merged, with_changes
from pool_managerd.config.load import load_values
from pool_managerd.errors import SpecError

HERE = Path("/etc/pm")


@pytest.fixture
def pool() -> PoolConfig:
    written = {
        "id": "chat", "engine": "llamacpp", "model": "file:m.gguf", "ctx": 2048,
        "provisioning": {"flags": ["--threads", "2"], "env": {"OMP_NUM_THREADS": "4"}},
    }  # fmt: skip
    return load_values({"pools": [written]}, HERE).pools[0]


def test_keys_are_changed_section_by_section_and_the_others_stay(pool: PoolConfig) -> None:
    new = with_changes(pool, {"model": "file:n.gguf", "provisioning": {"flags": ["--threads", "4"]}}, HERE)
    assert (new.model, new.ctx, new.provisioning.env) == ("file:n.gguf", 2048, {"OMP_NUM_THREADS": "4"})
    assert differences(pool, new) == [
        {"key": "model", "old": "file:m.gguf", "new": "file:n.gguf"},
        {"key": "provisioning.flags", "old": ["--threads", "2"], "new": ["--threads", "4"]},
    ]
    assert digest_of(new) != digest_of(pool) == digest_of(with_changes(pool, {}, HERE))


def test_null_is_as_if_it_were_not_written(pool: PoolConfig) -> None:
    new = with_changes(pool, {"ctx": None, "provisioning": {"env": None}}, HERE)
    assert new.ctx is None and new.provisioning.env == {} and new.provisioning.flags == ("--threads", "2")


def test_paths_are_relative_to_the_file(pool: PoolConfig) -> None:
    new = with_changes(pool, {"provisioning": {"mode": "binary", "binary": {"path": "bin/llama-server"}}}, HERE)
    assert new.provisioning.binary is not None and new.provisioning.binary.path == HERE / "bin/llama-server"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ctxx": 1}, "unknown key 'ctxx' (did you mean 'ctx'?)"),
        ({"ctx": "4k"}, "ctx: cannot use '4k': must be a whole number"),
        ({"provisioning": {"ports": 8081}}, "provisioning.ports: cannot use 8081: must be a list"),
        ({"id": "other"}, "cannot change 'id' of pool chat"),
        ({"engine": "vllm"}, "cannot change 'engine' of pool chat"),
    ],
)
def test_what_a_file_could_not_say_is_refused_in_the_same_words(pool: PoolConfig, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError) as refused:
        with_changes(pool, changes, HERE)
    assert refused.value.message == text and refused.value.code == "CONFIG_ERROR" and refused.value.pool_id == "chat"


def test_changes_add_up() -> None:
    first = merged({}, {"a": {"b": 1, "c": None}, "d": [1]})
    assert merged(first, {"a": {"c": 2}, "d": [2]}) == {"a": {"b": 1, "c": 2}, "d": [2]}
    assert first == {"a": {"b": 1, "c": None}, "d": [1]}


def test_a_map_that_gets_its_first_key_or_loses_its_last_is_told_by_that_key_alone(pool: PoolConfig) -> None:
    bare = with_changes(pool, {"provisioning": {"env": None}}, HERE)
    assert differences(bare, pool) == [{"key": "provisioning.env.OMP_NUM_THREADS", "old": None, "new": "4"}]
    assert differences(pool, bare) == [{"key": "provisioning.env.OMP_NUM_THREADS", "old": "4", "new": None}]
