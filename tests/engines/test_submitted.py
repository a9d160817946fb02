"""A submitted engine is checked key by key and then runs as given."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.engines.submitted import prepared_from_json
from pool_managerd.errors import SpecError

MINIMAL: dict[str, Any] = {"binary_path": "/bin/engine", "port": 9001}
FULL: dict[str, Any] = {
    **MINIMAL, "pool_id": "p", "flags": ["--b", "1", "--a", "--b", "2", ""], "host": "127.0.0.2", "model_path": "/m/x.gguf",
    "engine": "vllm", "engine_version": "v1", "replica_id": "r1", "device_mask": "0,1", "provisioning_mode": "binary",
    "slots_total": 3, "env": {"A": "b"},
}  # fmt: skip


def refusal(body: dict[str, Any]) -> SpecError:
    with pytest.raises(SpecError) as caught:
        prepared_from_json(body, "p")
    assert caught.value.status == 400
    return caught.value


def test_binary_and_port_are_enough() -> None:
    assert prepared_from_json(MINIMAL, "p") == PreparedEngine(
        pool_id="p", binary_path="/bin/engine", port=9001, provisioning_mode="source", verbatim=True
    )


def test_everything_is_taken_as_given_flags_in_their_order() -> None:
    engine = prepared_from_json(FULL, "p")
    assert engine.argv == ("/bin/engine", "--b", "1", "--a", "--b", "2", "")
    assert engine.url == "http://127.0.0.2:9001"
    assert (engine.engine, engine.engine_version, engine.replica_id, engine.device_mask) == ("vllm", "v1", "r1", "0,1")
    assert (engine.provisioning_mode, engine.slots_total, engine.env, engine.model_path) == ("binary", 3, {"A": "b"}, "/m/x.gguf")


def test_a_wrapped_body_means_the_same() -> None:
    assert prepared_from_json({"prepared": FULL}, "p") == prepared_from_json(FULL, "p")


def test_null_means_absent_where_that_is_a_value() -> None:
    engine = prepared_from_json({**MINIMAL, "model_path": None, "device_mask": None}, "p")
    assert (engine.model_path, engine.device_mask) == (None, None)


def test_the_bodys_pool_must_be_the_paths() -> None:
    assert "pool_id is 'other' and the path says 'p'" in refusal({**MINIMAL, "pool_id": "other"}).message


@pytest.mark.parametrize("missing", ["binary_path", "port"])
def test_a_missing_key_is_named(missing: str) -> None:
    body = {key: value for key, value in MINIMAL.items() if key != missing}
    assert f"the key {missing!r} is missing" in refusal(body).message


def test_an_unknown_key_is_named_with_the_one_that_was_meant() -> None:
    error = refusal({**MINIMAL, "flag": []})
    assert "unknown key 'flag'" in error.message
    assert error.hint == "did you mean 'flags'?"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", True), ("port", 0), ("port", 65536), ("port", "9001"), ("port", 1.0), ("port", None),
        ("binary_path", ""), ("binary_path", 7), ("binary_path", "a\0b"), ("binary_path", "x" * 40_000),
        ("flags", "--a"), ("flags", ["--a", 1]), ("flags", ["a\0b"]), ("flags", ["x"] * 2000), ("flags", None),
        ("host", "0.0.0.0"), ("host", "example.org"), ("host", "10.0.0.1"), ("host", "::"), ("host", 5),
        ("engine", "ollama"), ("provisioning_mode", "magic"), ("slots_total", 0), ("slots_total", True), ("slots_total", 10**9),
        ("env", ["A=b"]), ("env", {"A": 1}), ("env", {"A=": "b"}), ("env", {"": "b"}), ("env", {"A": "b\0"}),
        ("engine_version", ""), ("replica_id", "r" * 99), ("pool_id", 5), ("image_ref", {"image": "x"}), ("prepared", {}),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_by_name(key: str, value: object) -> None:
    assert key in refusal({**MINIMAL, key: value}).message or key == "prepared"


@pytest.mark.parametrize("mask", ["nothing", "0,0", "0" * 4000, ",", "-1"])
def test_a_mask_that_is_none_is_the_callers_mistake_and_is_quoted_in_short(mask: str) -> None:
    error = refusal({**MINIMAL, "device_mask": mask})
    assert "cannot use the submitted engine: the device mask" in error.message
    assert error.status == 400 and len(error.message) < 300


def test_a_loopback_name_and_ipv6_are_loopback() -> None:
    assert prepared_from_json({**MINIMAL, "host": "localhost"}, "p").host == "127.0.0.1"
    assert prepared_from_json({**MINIMAL, "host": "::1"}, "p").url == "http://[::1]:9001"


def test_what_stands_beside_the_wrapper_is_refused() -> None:
    assert "beside 'prepared'" in refusal({"prepared": MINIMAL, "port": 1}).message
    assert "must be an object" in refusal({"prepared": []}).message


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*FULL, "prepared"]) | st.text(max_size=8), _json, max_size=6))
def test_any_object_is_an_engine_or_a_spec_error(body: dict[str, Any]) -> None:
    try:
        assert prepared_from_json(body, "p").verbatim
    except SpecError as error:
        assert error.message.startswith("cannot use")


@pytest.mark.parametrize(
    "fields",
    [
        {"binary_path": "/" + "x" * 4_096},
        {"model_path": "m" * 4_097},
        {"flags": ["f" * 1_000] * 140},
        {"env": {f"K{n}": "v" * 1_000 for n in range(140)}},
    ],
)
def test_no_submission_is_larger_than_a_command_line_needs(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError) as caught:
        prepared_from_json({"binary_path": "/x", "port": 1, **fields}, "p")
    assert len(caught.value.message) < 300
