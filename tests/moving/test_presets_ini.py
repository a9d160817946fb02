"""The lines of a file of presets: what is read, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.errors import SpecError
from pool_managerd.moving.presets_ini import Presets, read


def entries(presets: Presets) -> dict[str, list[tuple[str, str]]]:
    return {name: [(one.key, one.value) for one in found] for name, found in presets.sections.items()}


def test_lines_are_read_as_the_router_reads_them() -> None:
    text = '; c\r\n  # c\rversion=1 ; the first\n\n[ a b ] # c\nk=\nmodel \t= "/m/a b.gguf"\t ; c\nx.y-z_1 = {"a":"#b"}\n[c]\n'
    found = read(text, "f")
    assert entries(found) == {"a b": [("k", ""), ("model", '"/m/a b.gguf"'), ("x.y-z_1", '{"a":"')], "c": []}
    assert found.versions == (("version",),) and found.source.line(("models", "a b", "model")) == 7


def test_the_global_section_is_none_of_the_models() -> None:
    found = read("[a]\nversion = 1\n[*]\nc = 1", "f")
    assert [one.key for one in found.everywhere] == ["c"] and list(found.sections) == ["a"]


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("", "f: cannot find any models in it", "--models-preset"),
        ("models:\n  a: {cmd: x}\n", "f:1:1: cannot read 'models' …: it is no [MODEL], no KEY = VALUE", "--models-preset"),
        ("[a]\n  c = 1\n", "f:2:1: cannot read it: keys and sections begin their line", "take out"),
        (" [a]\n", "f:1:1: cannot read it: keys and sections begin their line", "take out"),
        ("[a]\n--c = 1\n", "f:2:1: cannot read '--c' …", "--models-preset"),
        ("[a] b\n", "f:1:1: cannot read '[a]' …", "--models-preset"),
        ("[a]\napi-key: sk-1\n", "f:2:1: cannot read 'api-key' …: it is no", "--models-preset"),
        ("[a\n", "f:1:1: cannot read '[a'", "--models-preset"),
        ("[ ]\n", "f:1:1: cannot use a section without a name", "[*]"),
        ("c = 1\n[a]\n", "f:1:1: cannot use c before the first section", "[*]"),
        ("[a]\n[b]\n[a]\n", "f:3:1: cannot use the section 'a' twice: it is on line 1, too", "forgets the first"),
        ("[*]\n[a]\n[*]\n", "f:3:1: cannot use the section '*' twice", "forgets the first"),
        ("\nversion = 2\n[a]\n", "f:2:1: cannot read version '2' of presets: 1 is the one there is", "version = 1"),
        ("[a]\nversion =\n", "f:2:1: cannot read version '' of presets", "version = 1"),
        ("[a]\nmodel = \0\n", "f:2:1: cannot read it: it holds NUL", "--models-preset"),
        ("\ufeff[a]", "f:1:1: cannot read", "--models-preset"),
        ("".join(f"[{i}]\n" for i in range(1_001)), "f:1001:1: cannot use more than 1000 models", None),
        ("[*]\n" + "a = 1\n" * 501 + "".join(f"[{i}]\n" for i in range(100)), "f: cannot use more than 50000 keys", None),
        ("#" * (1 << 20 | 1), "f: cannot read it: it is larger than 1048576 bytes", None),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line_and_the_remedy(text: str, said: str, hint: str | None) -> None:
    with pytest.raises(SpecError) as caught:
        read(text, "f")
    assert caught.value.message.startswith(said) and caught.value.code == "CONFIG_ERROR"
    assert hint is None or hint in (caught.value.hint or "")


@given(st.text(alphabet="[]*=;#ab \t\r\n\0", max_size=40) | st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read(text, "f")
    except SpecError as error:
        assert "cannot" in error.message
