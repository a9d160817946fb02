"""Macros: as llama-swap expands them, and never without end."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.errors import SpecError
from pool_managerd.moving.macros import read
from pool_managerd.moving.source import go_text


def values(text: str, **env: str) -> dict[str, Any]:
    return read(text, "swap.yaml", env)[0].values


def refused(text: str, **env: str) -> str:
    with pytest.raises(SpecError) as caught:
        values(text, **env)
    assert caught.value.code == "CONFIG_ERROR"
    return caught.value.message


def test_a_value_that_is_one_macro_keeps_its_type() -> None:
    found = values("macros: {n: 4, f: 0.5, t: true}\nui: ['${n}', '${f}', '${t}', 'n=${n} f=${f} t=${t}']")
    assert found["ui"] == [4, 0.5, True, "n=4 f=0.5 t=true"]


def test_later_macros_may_hold_earlier_ones_and_a_models_own_win() -> None:
    found = values("macros: {c: 1, args: 'x ${c}'}\nmodels:\n  a: {macros: {c: 2}, cmd: 'p ${args}'}\n  b: {cmd: 'p ${args}'}")
    assert [found["models"][name]["cmd"] for name in "ab"] == ["p x 2", "p x 1"]


def test_the_models_id_and_its_port_are_macros_and_ports_go_by_sorted_names() -> None:
    source, _ = read(
        "startPort: 7000\nmodels:\n  z: {cmd: 'z ${PORT} ${MODEL_ID}'}\n  m: {cmd: m}\n  b: {cmd: 'b ${PORT}'}", "f", {}
    )
    assert source.ports == {"b": 7000, "z": 7001}
    assert source.values["models"]["z"]["cmd"] == "z 7001 z"


def test_keys_of_set_params_by_id_are_expanded_and_no_others() -> None:
    found = values(
        "models: {a: {cmd: x, metadata: {'${MODEL_ID}': '${MODEL_ID}'}, filters: {setParamsByID: {'${MODEL_ID}:hi': {}}}}}"
    )
    assert found["models"]["a"]["metadata"] == {"${MODEL_ID}": "a"}
    assert found["models"]["a"]["filters"] == {"setParamsByID": {"a:hi": {}}}


def test_comments_of_a_command_are_gone_before_macros_are_looked_for() -> None:
    assert values("models:\n  a:\n    cmd: |\n      # ${nothing}\n      x\n")["models"]["a"]["cmd"] == "x\n"


def test_variables_are_replaced_in_the_text_and_may_be_numbers() -> None:
    found = values('globalTTL: ${env.T}\nui: "${env.Q}"  # ${env.NOT_ASKED_FOR}', T="30", Q='a"b\\c')
    assert found == {"globalTTL": 30, "ui": 'a"b\\c'}


def test_a_variable_makes_yaml_of_what_was_none() -> None:
    assert values("ui: [${env.A}]", A="1, 2") == {"ui": [1, 2]}


def test_secret_variables_are_not_read_nor_missed() -> None:
    source, _ = read('apiKeys: ["${env.MY_API_KEY}"]\nui: "${env.TOKENIZER}"', "f", {"MY_API_KEY": "hunter22", "TOKENIZER": "t"})
    assert "hunter22" not in str(source.values) and source.values["ui"] == "t"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nui: ${env.NOPE}", "swap.yaml:2: cannot expand ${env.NOPE}: the environment has no NOPE"),
        ("\nui: x${nope}", "swap.yaml:2:1: ui: cannot expand ${nope}: there is no macro of that name"),
        ("models:\n  a: {cmd: '${nope}'}", "swap.yaml:2:7: models.a.cmd: cannot expand ${nope}"),
        ("models:\n  a: {cmd: 'x ${PID}'}", "cannot expand ${PID}"),
        ("models: {a: {cmd: x, proxy: 'http://h:${PORT}'}}", "models.a.proxy: cannot expand ${PORT}"),
        ("macros: {PORT: 1}", "macros.PORT: cannot use this name"),
        ("macros: {'a b': 1}", "cannot use this name"),
        (f"macros: {{{'a' * 64}: 1}}", "cannot use this name"),
        ("macros: {a: [1]}", "macros.a: cannot use this value"),
        ("macros: {a: ~}", "macros.a: cannot use this value"),
        ("macros: {a: 'x${a}'}", "macros.a: cannot expand it: it holds itself"),
        ("macros: [1]", "macros: cannot use this: it must be a mapping"),
        ("macros: {b: '${a}', a: '${b}'}\nui: '${a}'", "cannot expand ${a}"),
        ("startPort: 0", "startPort: cannot use 0"),
        ("startPort: x", "startPort: cannot use 'x': it must be a whole number"),
        ("macros: {m: 'x'}\nmodels: {a: {cmd: x, filters: {setParamsByID: {'${m}': {}, x: {}}}}}", "two keys are 'x'"),
        ("models: {a: {cmd: x, filters: {setParamsByID: {'${m}': {}}}}}", "cannot expand ${m}"),
        ("a: [", "cannot read it as YAML"),
        ("", "swap.yaml:1:1: cannot use an empty file"),
        ("# only a comment", "cannot use an empty file"),
        ("- a", "the top must be a mapping"),
        ("a: !!python/object:os.system x", "only plain values are read"),
        ("a: 1\na: 2", "duplicate key 'a'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize("value", ["a\nb", "a\0b"])
def test_a_variable_that_would_break_the_text_is_refused(value: str) -> None:
    assert "a line break or a NUL" in refused("ui: ${env.A}", A=value)


@pytest.mark.parametrize(
    "text",
    [
        "macros:\n  m0: xxxxxxxx\n" + "".join(f"  m{i}: '${{m{i - 1}}}${{m{i - 1}}}'\n" for i in range(1, 60)) + "ui: '${m59}'",
        "macros: {m: '" + "x" * 9_000 + "'}\nui: [" + ", ".join(["'${m}'"] * 2_000) + "]",
        "a: " + "[" * 100 + "]" * 100,
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"b{i}: &b{i} [{', '.join(['*' + p] * 8)}]\n" for i, p in enumerate(["a", *(f"b{j}" for j in range(12))])),
        "a: '" + "x" * (1 << 20) + "'",
        "macros: {" + ", ".join(f"m{i}: 1" for i in range(501)) + "}",
        "a: [" + "1, " * 60_000 + "1]",
        'a: "\x07"',
        "a: 'x\0y'",
    ],
    ids=["doubling", "wide", "deep", "aliases", "large", "many", "long", "bell", "nul"],
)
def test_bombs_are_refused_soon(text: str) -> None:
    began = time.monotonic()
    assert "cannot" in refused(text)
    assert time.monotonic() - began < 20


def test_a_variable_cannot_make_the_file_too_large() -> None:
    assert "larger than" in refused("ui: [" + ", ".join(["'${env.A}'"] * 200) + "]", A="x" * 60_000)


scalars = st.one_of(
    st.integers(-5, 10**6), st.booleans(), st.text(alphabet="ab ", max_size=4), st.floats(0.01, 100).map(lambda n: round(n, 2))
)


@given(st.data())
def test_any_macros_expand_as_one_after_the_other_would(data: st.DataObject) -> None:
    """The reference is the definition: for each macro, the last one first, replace it everywhere."""
    macros: dict[str, Any] = {}
    for index in range(data.draw(st.integers(0, 5))):
        parts = st.lists(st.sampled_from([*(f"${{{name}}}" for name in macros), "x", "-", " "]), max_size=4).map("".join)
        macros[f"m{index}"] = data.draw(st.one_of(scalars, parts))
    uses = [*(f"${{{name}}}" for name in macros), "${MODEL_ID}", "y", " "]
    texts = data.draw(st.lists(st.lists(st.sampled_from(uses), max_size=4).map("".join), max_size=5))
    source = {"macros": macros, "models": {"a": {"cmd": "x", "metadata": {"list": texts}}}}
    import json

    assert values(json.dumps(source))["models"]["a"]["metadata"]["list"] == [reference(text, macros) for text in texts]


def reference(value: Any, macros: dict[str, Any]) -> Any:
    for name, new in reversed([("MODEL_ID", "a"), *macros.items()]):
        use = f"${{{name}}}"
        if value == use:
            value = new
        elif isinstance(value, str):
            value = value.replace(use, go_text(new))
    return value


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (0.7, "0.7"), (True, "true"), (False, "false"), (4, "4"), (1e22, "1e+22")]
)
def test_numbers_are_written_as_llama_swap_writes_them(value: object, text: str) -> None:
    assert go_text(value) == text
