"""One configuration out of a file, the environment and flags."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.config import Config
from pool_managerd.config.load import load_config
from pool_managerd.errors import SpecError

POOL = "{id: a, engine: llamacpp, model: 'file:m.gguf'}"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str, name: str = "pm.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return put


def problems(path: Path | None, env: dict[str, str] | None = None, **flags: object) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_config(path, env=env or {}, overrides={key.replace("__", "."): value for key, value in flags.items()})
    assert caught.value.code == "CONFIG_ERROR"
    assert caught.value.status == 400
    prefix = f"{path.parent}{os.sep}" if path else ""
    return [line.replace(prefix, "") for line in caught.value.message.splitlines()]


def test_yaml_and_toml_mean_the_same(write: Write) -> None:
    yaml = write(f"profile: dev\nhealth: {{interval_ms: 50}}\npools:\n  - {POOL}\n")
    toml = write(
        'profile = "dev"\n[health]\ninterval_ms = 50\n[[pools]]\nid = "a"\nengine = "llamacpp"\nmodel = "file:m.gguf"\n',
        "pm.toml",
    )
    assert load_config(yaml, env={}) == load_config(toml, env={})
    assert load_config(yaml, env={}).health.interval_ms == 50


def test_without_a_file_everything_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, env={})
    assert config.daemon.runtime_dir == tmp_path / ".runtime"
    assert config.daemon.state_dir == tmp_path / ".state"
    assert config.model_copy(update={"daemon": Config().daemon, "base_dir": Path()}) == Config()


def test_flags_win_over_the_environment_and_that_over_the_file(write: Write) -> None:
    path = write("daemon: {bind: '127.0.0.1:1', on_exit: leave}\nhealth: {interval_ms: 1}\n")
    env = {"POOL_MANAGERD__DAEMON__BIND": "127.0.0.1:2", "POOL_MANAGERD__HEALTH__INTERVAL_MS": "2", "PATH": "/bin"}
    config = load_config(path, env=env, overrides={"daemon.bind": "127.0.0.1:3", "daemon.state_dir": None})
    assert (config.daemon.bind, config.health.interval_ms, config.daemon.on_exit) == ("127.0.0.1:3", 2, "leave")


def test_the_legacy_variables_still_work(tmp_path: Path) -> None:
    config = load_config(None, env={"POOL_MANAGERD_ADDR": "127.0.0.1:7", "POOL_MANAGERD_RUNTIME_DIR": str(tmp_path)})
    assert (config.daemon.bind, config.daemon.runtime_dir) == ("127.0.0.1:7", tmp_path)


def test_two_variables_that_disagree_are_an_error() -> None:
    found = problems(None, {"POOL_MANAGERD_ADDR": "127.0.0.1:7", "POOL_MANAGERD__DAEMON__BIND": "127.0.0.1:8"})
    assert found == [
        "$POOL_MANAGERD__DAEMON__BIND: daemon.bind: cannot set it to two values: "
        "POOL_MANAGERD_ADDR says otherwise; unset one of them"
    ]


def test_the_environment_reaches_into_pools_and_free_maps(write: Write) -> None:
    path = write(f"pools:\n  - {POOL}\n")
    env = {
        "POOL_MANAGERD__POOLS__0__SLOTS": "4",
        "POOL_MANAGERD__POOLS__0__DEVICES": "[0, 1]",
        "POOL_MANAGERD__POOLS__0__PROVISIONING__ENV__FOO": "7",
        "POOL_MANAGERD__TELEMETRY__LABELS__tenant_id": "42",
        "POOL_MANAGERD__AUTH__TOKEN_FILE": "null",
    }
    config = load_config(path, env=env)
    assert (config.pools[0].slots, config.pools[0].devices) == (4, (0, 1))
    assert config.pools[0].provisioning.env == {"FOO": "7"}
    assert config.telemetry.labels == {"tenant_id": "42"}
    assert config.auth.token_file is None


def test_paths_are_relative_to_the_file_or_to_the_current_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write(
        "daemon: {runtime_dir: r}\nauth: {token_file: tok}\npools:\n"
        "  - {id: a, engine: llamacpp, model: 'file:m', provisioning: {binary: {path: bin/x}}}\n"
    )
    config = load_config(path, env={})
    assert config.base_dir == tmp_path
    assert (config.daemon.runtime_dir, config.daemon.state_dir) == (elsewhere / "r", elsewhere / ".state")
    assert config.auth.token_file == tmp_path / "tok"
    binary = config.pools[0].provisioning.binary
    assert binary is not None
    assert binary.path == tmp_path / "bin/x"
    assert config.pools[0].model == "file:m"


def test_the_home_of_an_unknown_user_is_a_name_like_any_other(write: Write, tmp_path: Path) -> None:
    config = load_config(write("auth: {token_file: ~no-such-user/tok}\n"), env={})
    assert config.auth.token_file == tmp_path / "~no-such-user/tok"


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write(
        "supervisoin: {}\n"
        "daemon: {bind: nope}\n"
        "health: 3\n"
        "pools:\n"
        "  - {id: a, engine: llamacpp, model: m, slots: 0, slot: 2}\n"
        "  - {id: ../b, engine: foo}\n"
        "  - {id: a, engine: llamacpp, model: m}\n"
    )
    assert problems(path) == [
        "pm.yaml:1:1: unknown key 'supervisoin' (did you mean 'supervision'?)",
        "pm.yaml:2:10: daemon.bind: cannot use 'nope': 'nope' is not HOST:PORT, as 127.0.0.1:9200",
        "pm.yaml:3:1: health: cannot use 3: must be a section of keys",
        "pm.yaml:5:41: pools[0].slots: cannot use 0: must be ≥ 1",
        "pm.yaml:5:51: pools[0]: unknown key 'slot' (did you mean 'slots'?)",
        "pm.yaml:6:5: pools[1].model: cannot leave it out: add `model: …`",
        "pm.yaml:6:6: pools[1].id: cannot use '../b': must be 1 to 63 letters, digits, '.', '_' or '-', "
        "starting with a letter or digit, without '..'",
        "pm.yaml:6:16: pools[1].engine: cannot use 'foo': must be 'llamacpp', 'vllm', 'tgi' or 'triton'",
        "pm.yaml:7:6: pools[2].id: cannot use 'a' again: duplicate pool id, first used at "
        f"{path}:5:6; every pool needs its own".replace(f"{path.parent}/", ""),
    ]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("'4'", "cannot use '4': must be a whole number"),
        ("true", "cannot use true: must be a whole number"),
        ("1.5", "cannot use 1.5: must be a whole number"),
        ("null", "cannot use null: must be a whole number"),
        ("[1]", "cannot use [1]: must be a whole number"),
        ("-1", "cannot use -1: must be ≥ 1"),
    ],
)
def test_types_are_strict(write: Write, value: str, rule: str) -> None:
    assert problems(write(f"health: {{interval_ms: {value}}}")) == [f"pm.yaml:1:10: health.interval_ms: {rule}"]


def test_a_wrong_variable_or_flag_is_named() -> None:
    env = {"POOL_MANAGERD__SUPERVISION__BACKOFF__INITAL_MS": "5", "POOL_MANAGERD__PROFILE": "7", "POOL_MANAGERD__BASE_DIR": "/"}
    found = problems(None, env, daemon__runtime_dir=5)
    assert found[0].startswith("$POOL_MANAGERD__BASE_DIR: unknown key 'base_dir'")
    assert found[1:] == [
        "$POOL_MANAGERD__PROFILE: profile: cannot use '7': must be 'home', 'cloud' or 'dev'",
        "$POOL_MANAGERD__SUPERVISION__BACKOFF__INITAL_MS: supervision.backoff: "
        "unknown key 'inital_ms' (did you mean 'initial_ms'?)",
        "--runtime-dir: daemon.runtime_dir: cannot use 5: must be text; put it in quotes if it looks like a number",
    ]


def test_a_variable_for_a_pool_that_is_not_there_is_an_error() -> None:
    assert problems(None, {"POOL_MANAGERD__POOLS__3__SLOTS": "2"}) == [
        "$POOL_MANAGERD__POOLS__3__SLOTS: pools[3].slots: cannot set it: there is no pools[3]"
    ]


def test_values_of_an_engines_environment_are_not_shown(write: Write) -> None:
    path = write("pools:\n  - {id: a, engine: llamacpp, model: m, provisioning: {env: {TOKEN: 123456}}}\n")
    assert "123456" not in "".join(problems(path))


def test_a_toml_problem_names_the_key_and_a_syntax_error_its_line(write: Write) -> None:
    assert problems(write("[health]\ninterval = 1\n", "a.toml")) == [
        "a.toml: health: unknown key 'interval' (did you mean 'interval_ms'?)"
    ]
    assert problems(write("a = 1\na = = 2\n", "b.toml")) == ["b.toml:2:5: cannot read it as TOML: Invalid value"]


def test_a_file_that_cannot_be_read_is_told_apart(tmp_path: Path, write: Write) -> None:
    assert problems(tmp_path / "none.yaml") == ["none.yaml: cannot read it: No such file or directory"]
    (tmp_path / "dir.yaml").mkdir()
    assert problems(tmp_path / "dir.yaml") == ["dir.yaml: cannot read it: it is not a regular file"]
    os.mkfifo(tmp_path / "pipe.yaml")
    assert problems(tmp_path / "pipe.yaml") == ["pipe.yaml: cannot read it: it is not a regular file"]
    assert problems(write("", "empty.yaml"))[0].startswith("empty.yaml:1:1: cannot use an empty file")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    assert problems(tmp_path / "latin.yaml") == ["latin.yaml: cannot read it: byte 3 is not UTF-8"]


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("[]", ()),
        ("[0, 1]", (0, 1)),
        ('"0,1"', (0, 1)),
        ('"GPU0,GPU1"', (0, 1)),
        ("[GPU-aa, MIG-bb]", None),
        ('["GPU-aa", 1]', ("GPU-aa", 1)),
    ],
)
def test_devices_are_written_as_a_list_or_as_text(tmp_path: Path, written: str, devices: tuple[int | str, ...] | None) -> None:
    file = tmp_path / "pm.yaml"
    file.write_text(f'pools: [{{id: a, engine: llamacpp, model: "file:m.gguf", devices: {written}}}]\n')
    if devices is None:
        with pytest.raises(SpecError, match="mixes MIG instances with whole GPUs"):
            load_config(file, env={})
    else:
        assert load_config(file, env={}).pools[0].devices == devices


@pytest.mark.parametrize(("written", "size"), [("1024", 1024), ("28GiB", 28 << 30), ('"1.5 gib"', 3 << 29)])
def test_vram_bytes_may_be_written_as_a_size(tmp_path: Path, written: str, size: int) -> None:
    file = tmp_path / "pm.yaml"
    file.write_text(f'pools: [{{id: a, engine: llamacpp, model: "file:m.gguf", vram_bytes: {written}}}]\n')
    assert load_config(file, env={}).pools[0].vram_bytes == size


def test_simulated_gpus_and_shares_that_cannot_be_are_refused_with_the_place(tmp_path: Path) -> None:
    file = tmp_path / "pm.yaml"
    file.write_text("profile: home\ngpu: {simulate: topology}\npools: []\n")
    with pytest.raises(SpecError, match="cannot simulate GPUs"):
        load_config(file, env={})
    file.write_text('pools: [{id: a, engine: llamacpp, model: "file:m", devices: [0, 1], tensor_split: [1]}]\n')
    with pytest.raises(SpecError, match="tensor_split has 1 shares for 2 devices"):
        load_config(file, env={})


def test_a_wrong_value_that_pools_share_is_shown_where_it_was_written(write: Write) -> None:
    pools = "pools:\n  - {<<: *base, id: a, model: m}\n  - {<<: *base, id: b, modle: m}\n"
    text = "x-base: &base\n  engine: llamacpp\n  ctx: many\n" + pools
    assert problems(write(text)) == [
        "pm.yaml:3:3: pools[0].ctx: cannot use 'many': must be a whole number",
        "pm.yaml:3:3: pools[1].ctx: cannot use 'many': must be a whole number",
        "pm.yaml:6:5: pools[1].model: cannot leave it out: add `model: …`",
        "pm.yaml:6:24: pools[1]: unknown key 'modle' (did you mean 'model'?)",
    ]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("threads: 4", 'provisioning: {flags: ["--threads", "4"]}'), ("n_gpu_layers: 10", '["--n-gpu-layers", "10"]'),
        ("port: 8080", "it belongs into provisioning.ports"), ("args: [-t, 4]", "it belongs into provisioning.flags"),
        ("env: {A: b}", "it belongs into provisioning.env"), ("gpu: 0", "write devices"), ("ctx_size: 3", "write ctx"),
        ("max_model_len: 5", "write ctx"), ("gpu_memory_utilization: 0.9", "vram_bytes: 20GiB"),
        ("slot: 2", "did you mean 'slots'"),
    ],
)  # fmt: skip
def test_a_key_that_another_tool_has_is_told_where_it_stands_here(tmp_path: Path, key: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(f'pools:\n  - {{id: a, engine: llamacpp, model: "file:m", {key}}}\n')
    with pytest.raises(SpecError, match=re.escape(words)):
        load_config(tmp_path / "c.yaml", env={})


def test_a_port_at_the_top_is_the_daemons(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: 8080\nservers: []\n")
    with pytest.raises(SpecError, match=r"daemon\.bind.*\n.*write pools"):
        load_config(tmp_path / "c.yaml", env={})


POOLS = """
pools:
  - {id: a, engine: llamacpp, model: "file:a.gguf"}
  - {id: b, engine: llamacpp, model: "file:b.gguf"}
  - {id: c, engine: vllm, model: c, provisioning: {mode: external, url: "http://127.0.0.1:1"}}
"""


@pytest.mark.parametrize(
    ("together", "problem"),
    [
        ("{groups: [{id: g, pools: [a, x]}]}", "together names pool 'x', which is no pool of this file"),
        ("{sets: [[a, c]]}", "together names pool 'c', which is external"),
        ("{groups: [{id: g, pools: [a]}], sets: [[b]]}", "cannot have groups and sets"),
        ("{groups: [{id: g, pools: [a]}, {id: h, pools: [a]}]}", "pool 'a' is in the groups 'g' and 'h': a pool is in one"),
        ("{groups: [{id: g, pools: [a]}, {id: g, pools: [b]}]}", "duplicate group id 'g'"),
        ("{groups: [{id: g, pools: [a, b]}]}", "pools 'a' and 'b' are kept apart by together: set `preload: false`"),
        ("{sets: [[a]]}", "pools 'a' and 'b' are kept apart by together"),
        ("{groups: [{id: g, pools: []}]}", "together.groups[0].pools"),
        ("{groups: [{id: g, members: [a]}]}", "unknown key 'members'"),
    ],
)
def test_rules_on_what_is_loaded_together_are_checked_against_the_pools(write: Write, together: str, problem: str) -> None:
    assert problem in "\n".join(problems(write(f"together: {together}{POOLS}")))


def test_pools_that_may_be_together_may_start_together(write: Write) -> None:
    text = "together: {groups: [{id: g, pools: [a], exclusive: true}, {id: h, pools: [b], persistent: true}]}" + POOLS
    assert load_config(write(text), env={}).together.rules.groups[1].persistent
