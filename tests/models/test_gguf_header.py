"""GGUF headers: the same facts as the format's own package reads, and nothing but a refusal for what is hostile."""

from __future__ import annotations

import os
import shutil
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import SpecError
from pool_managerd.models import gguf_header
from pool_managerd.models.gguf_header import ArrayValue, read_gguf_header
from pool_managerd.models.gguf_shape import read_gguf_shape
from tests.models.made_models import Maker, write_deepseek2, write_gemma3

UINT32, STRING, ARRAY = 4, 8, 9


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def file_of(tmp_path: Path, *parts: bytes, tensors: int = 0, keys: int = 0, data: int = 0) -> str:
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)
    path.write_bytes(head + b"\0" * (-len(head) % 32 + data))
    return str(path)


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def refusal(path: str) -> str:
    with pytest.raises(SpecError) as caught:
        read_gguf_shape(path)
    assert caught.value.hint
    assert caught.value.message.startswith(f"cannot use {path} as a GGUF model: ")
    return caught.value.message


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"gemma3": write_gemma3(folder / "gemma3.gguf"), "deepseek2": write_deepseek2(folder / "deepseek2.gguf")}


def oracle(path: Path) -> Any:
    gguf = pytest.importorskip("gguf")
    return gguf.GGUFReader(str(path))


@pytest.mark.parametrize("which", ["tiny", "smol", "gemma3", "deepseek2"])
def test_it_reads_what_the_formats_own_package_reads(
    which: str, tiny_model: Path, smol_model: Path, models: dict[str, Path]
) -> None:
    path = {"tiny": tiny_model, "smol": smol_model, **models}[which]
    real, mine = oracle(path), read_gguf_header(str(path))
    assert [(t.name, tuple(map(int, t.shape)), int(t.n_bytes)) for t in real.tensors] == [
        (t.name, t.dims, t.size_bytes) for t in mine.tensors
    ]
    assert [int(t.data_offset) - int(real.data_offset) for t in real.tensors] == [t.offset for t in mine.tensors]
    theirs = {name: field for name, field in real.fields.items() if not name.startswith("GGUF.")}
    assert set(theirs) == set(mine.values)
    for name, field in theirs.items():
        value, expected = mine.values[name], field.contents()
        if isinstance(value, ArrayValue):
            if field.types:
                assert value.length == (len(expected) if field.types[0].name == "ARRAY" else 0), name
            if value.items is not None:
                assert list(value.items) == pytest.approx(expected)
        else:
            assert value == pytest.approx(expected) if isinstance(value, float) else value == expected, name


def test_the_shape_of_the_bundled_model(smol_model: Path) -> None:
    shape = read_gguf_shape(str(smol_model))
    assert shape == ModelShape(
        architecture="llama", weights_bytes=96_576_768, n_layers=30, n_embd=576, n_vocab=49_152, n_heads=9, kv_heads=(3,) * 30,
        key_length=64, value_length=64, feed_forward=1_536, ctx_train=8_192, input_bytes=30_081_024, tied_output=True,
        quantization="Q4_1",
    )  # fmt: skip
    assert shape.plain_cache


def test_a_long_vocabulary_is_passed_over_quickly_and_not_kept(smol_model: Path) -> None:
    read_gguf_shape(str(smol_model))
    tracemalloc.start()
    try:
        read_gguf_shape(str(smol_model))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    best = min(_seconds(str(smol_model)) for _ in range(5))
    assert best < 0.2, "20 ms on a quiet machine"


def _seconds(path: str) -> float:
    begin = time.perf_counter()
    read_gguf_shape(path)
    return time.perf_counter() - begin


def test_windows_and_compressed_caches_are_told(models: dict[str, Path]) -> None:
    gemma = read_gguf_shape(str(models["gemma3"]))
    assert gemma.window is not None
    assert gemma.window.layers == (True, True, True, True, True, False) * 2
    assert gemma.tied_output
    deep = read_gguf_shape(str(models["deepseek2"]))
    assert (deep.latent_cache, deep.kv_heads, deep.key_length) == (True, (1,) * 4, 192)


def made(path: Path, architecture: str, layers: int, **numbers: int) -> Maker:
    maker = Maker(path, architecture, layers)
    maker.numbers(**numbers)
    return maker


def test_layers_without_a_cache_keep_a_state(tmp_path: Path) -> None:
    maker = made(tmp_path / "m.gguf", "mamba", 4, ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=16)
    shape = read_gguf_shape(str(maker.done()))
    assert shape.kv_heads == (0,) * 4
    assert shape.recurrent is not None
    assert shape.recurrent.bytes_per_sequence == 4 * 4 * (3 * 512 + 16 * 512)

    maker = made(tmp_path / "h.gguf", "jamba", 3, ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=16)
    maker.numbers(attention__head_count=8)
    maker.writer.add_array("jamba.attention.head_count_kv", [0, 2, 0])
    shape = read_gguf_shape(str(maker.done()))
    assert shape.kv_heads == (0, 2, 0)
    assert shape.recurrent is not None
    assert shape.recurrent.bytes_per_sequence == 2 * 4 * (3 * 512 + 16 * 512)


def test_facts_of_the_wrong_kind_are_unknown_facts(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "m.gguf", "llama", 4)
    maker.writer.add_string("llama.attention.head_count", "many")
    maker.writer.add_array("llama.attention.head_count_kv", [1, 2])
    shape = read_gguf_shape(str(maker.done()))
    assert (shape.n_heads, shape.kv_heads, shape.plain_cache) == (None, None, False)
    huge = Maker(tmp_path / "h.gguf", "llama", 4_000_000_000)
    assert read_gguf_shape(str(huge.done())).n_layers is None


def write_split(tmp_path: Path, tiny_model: Path, count: int = 3) -> list[Path]:
    gguf = pytest.importorskip("gguf")
    reader = oracle(tiny_model)
    paths = [tmp_path / f"big-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        if number == 0:
            writer.add_block_count(2)
        for found in reader.tensors[number::count]:
            writer.add_tensor(found.name, found.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_model_is_the_sum_of_its_parts(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_split(tmp_path, tiny_model)
    shape = read_gguf_shape(str(paths[0]))
    assert (shape.weights_bytes, shape.parts) == (read_gguf_shape(str(tiny_model)).weights_bytes, 3)
    assert "not the first of 3 parts; name big-00001-of-00003.gguf" in refusal(str(paths[1]))
    paths[2].unlink()
    assert "1 of its 3 parts are missing, first big-00003-of-00003.gguf" in refusal(str(paths[0]))
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    assert "does not end in -00001-of-00003.gguf" in refusal(str(renamed))


def test_an_incomplete_download_is_called_one(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(tiny_model, path)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"it has {size - 1} bytes of the {size} that its tensors need: the download is not complete" in refusal(str(path))
    os.truncate(path, 4_000)
    assert "ends within its header: the download is not complete" in refusal(str(path))


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "none"):
        assert "it is not a file" in refusal(str(tmp_path / name)) or name == "none"


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


NESTED = struct.pack("<IQ", ARRAY, 1) * 3_000


@pytest.mark.parametrize(
    ("counts", "parts", "reason"),
    [
        ((0, 1 << 63), (), "claims 9223372036854775808 metadata keys"),
        ((1 << 40, 0), (), "claims 1099511627776 tensors"),
        ((0, 1), (struct.pack("<Q", 1 << 60),), "a text in it is 1152921504606846976 bytes long"),
        ((0, 1), (key("k", STRING, struct.pack("<Q", 1 << 60)),), "a text in it is 1152921504606846976 bytes"),
        ((0, 1), (key("k", ARRAY, struct.pack("<IQ", STRING, 1 << 50)),), "claims 1125899906842624 items of an array"),
        ((0, 1), (key("k", ARRAY, struct.pack("<IQ", STRING, 1 << 20)),), "ends within its header"),
        ((0, 1), (key("k", ARRAY, struct.pack("<IQ", UINT32, 1 << 22)),), "ends within its header"),
        ((0, 1), (key("k", ARRAY, NESTED),), "an array lies within an array"),
        ((0, 1), (key("k", 77, b""),), "unknown type 77"),
        ((0, 2), (key("k", UINT32, b"\1\0\0\0") * 2,), "key 'k' appears twice"),
        ((0, 1), (key("general.alignment", UINT32, b"\3\0\0\0"),), "alignment is no power of two"),
        ((1, 0), (text("t") + struct.pack("<I", 1_000),), "has 1000 dimensions"),
        ((1, 0), (tensor("t", (1 << 40, 1 << 40)),), "impossible dimensions"),
        ((1, 0), (tensor("t", (0, 8)),), "impossible dimensions"),
        ((1, 0), (tensor("t", (8,), offset=(1 << 64) - 32),), "the download is not complete"),
        ((1, 0), (tensor("t", (33,), kind=2),), "no multiple of its type's 32"),
        ((2, 0), (tensor("t", (8,)), tensor("t", (8,))), "tensor's name appears twice"),
        ((2, 0), (tensor("a", (16,)), tensor("b", (16,))), "tensors overlap"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused_with_their_reason(
    tmp_path: Path, counts: tuple[int, int], parts: tuple[bytes, ...], reason: str
) -> None:
    assert reason in refusal(file_of(tmp_path, *parts, tensors=counts[0], keys=counts[1], data=64))


def test_a_sparse_file_with_a_long_text_costs_nothing(tmp_path: Path) -> None:
    path = file_of(tmp_path, key("k", STRING, struct.pack("<Q", 15 << 20)), keys=1)
    os.truncate(path, 1 << 40)
    begin = time.perf_counter()
    assert read_gguf_shape(path).weights_bytes == 0
    assert time.perf_counter() - begin < 1


def test_a_header_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1 << 20)
    path = file_of(tmp_path, key("k", STRING, struct.pack("<Q", 15 << 20)), keys=1)
    os.truncate(path, 1 << 40)
    assert "its header is longer than 1048576 bytes" in refusal(path)


def test_a_tensor_of_an_unknown_type_reaches_to_the_next_one(tmp_path: Path) -> None:
    path = file_of(tmp_path, tensor("a", (8, 8), kind=999), tensor("b", (8,), offset=96), tensors=2, data=128)
    assert [t.size_bytes for t in read_gguf_header(path).tensors] == [96, 32]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "m.gguf"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 9_000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6),
    cut=st.none() | st.integers(0, 20_000),
)
def test_damage_gives_a_shape_or_a_refusal_and_nothing_else(
    tiny_model: Path, scratch: Path, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    raw = bytearray(tiny_model.read_bytes())
    for at, new in edits:
        raw[at : at + len(new)] = new
    scratch.write_bytes(raw[:cut])
    try:
        assert isinstance(read_gguf_shape(str(scratch)), ModelShape)
    except SpecError as error:
        assert error.message.startswith("cannot use ")
