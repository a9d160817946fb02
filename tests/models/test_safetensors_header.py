"""safetensors headers and config.json: facts for a fit estimate, refusals for what is damaged or hostile."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import SpecError
from pool_managerd.models.safetensors_header import read_safetensors_shape

QWEN = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100, "max_position_embeddings": 4096, "intermediate_size": 128, "tie_word_embeddings": True,
}  # fmt: skip


def entry(shape: list[int], start: int, dtype: str = "BF16", width: int = 2) -> dict[str, Any]:
    size = width
    for dim in shape:
        size *= dim
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def write(path: Path, header: dict[str, Any] | bytes, data: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    ends = [e["data_offsets"][1] for e in header.values() if "data_offsets" in e] if isinstance(header, dict) else []
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + (max(ends, default=0) if data is None else data))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    write(
        tmp_path / "model.safetensors",
        {"__metadata__": {"format": "pt"}, "model.embed_tokens.weight": entry([100, 64], 0), "w": entry([64, 64], 12_800)},
    )
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        read_safetensors_shape(str(path))
    assert caught.value.hint
    assert caught.value.message.startswith("cannot use ")
    return caught.value.message


def test_a_model_folder_gives_its_shape(model: Path) -> None:
    assert read_safetensors_shape(str(model)) == ModelShape(
        architecture="qwen2", weights_bytes=12_800 + 8_192, n_layers=2, n_embd=64, n_vocab=100, n_heads=4, kv_heads=(2, 2),
        key_length=16, value_length=16, feed_forward=128, ctx_train=4096, input_bytes=12_800, tied_output=True,
        quantization="BF16",
    )  # fmt: skip
    assert read_safetensors_shape(str(model / "model.safetensors")) == read_safetensors_shape(str(model))


def test_shards_are_those_of_the_index_and_all_must_be_there(model: Path) -> None:
    (model / "model.safetensors").unlink()
    for number in (1, 2):
        write(model / f"model-0000{number}-of-00002.safetensors", {f"w{number}": entry([8, 8], 0)})
    write(model / "consolidated.safetensors", {"w1": entry([8, 8], 0)})
    assert read_safetensors_shape(str(model)).parts == 2, "without an index, the whole model in one piece is not counted again"
    index = {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_safetensors_shape(str(model)).weights_bytes == 2 * 128
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "1 of its 2 files are missing, first model-00002-of-00002.safetensors" in refusal(model)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "evil.bin"])
def test_an_index_cannot_lead_out_of_its_folder(model: Path, name: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert "does not lie beside it" in refusal(model)


def test_an_incomplete_download_is_called_one(model: Path) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"it has {size - 1} bytes of the {size} that its tensors need: the download is not complete" in refusal(model)
    os.truncate(path, 40)
    assert "ends within its header: the download is not complete" in refusal(model)


def test_a_model_without_config_is_known_by_its_size_alone(model: Path) -> None:
    (model / "config.json").unlink()
    shape = read_safetensors_shape(str(model))
    assert (shape.weights_bytes, shape.n_layers, shape.plain_cache) == (20_992, None, False)


def test_facts_of_the_wrong_kind_are_unknown_facts(model: Path) -> None:
    for wrong in ("2", -1, True, 1 << 60, None, [2], 2.5):
        (model / "config.json").write_text(json.dumps({**QWEN, "num_hidden_layers": wrong}))
        assert read_safetensors_shape(str(model)).n_layers is None, wrong


def test_windows_compressed_caches_and_inner_configurations_are_told(model: Path) -> None:
    inner = {**QWEN, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    shape = read_safetensors_shape(str(model))
    assert shape.window is not None
    assert (shape.window.tokens, shape.window.layers) == (512, (True, False))
    (model / "config.json").write_text(json.dumps({**QWEN, "kv_lora_rank": 512, "qk_rope_head_dim": 64}))
    shape = read_safetensors_shape(str(model))
    assert (shape.latent_cache, shape.kv_heads, shape.key_length) == (True, (1, 1), 576)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2, 3]", "no object"),
        (b'{"a": [' + b"[]," * 2_000_000 + b"0]}", "more parts than 131072 tensors need"),
        (b'{"a": [' + b"0," * 4_000_000 + b"0]}", "more parts than 131072 tensors need"),
        (b'{"a": {}, "a": {}}', "a key appears twice"),
        (b'{"a": 1}', "describes no tensor"),
        (b"\xff\xfe{}", "cannot be read"),
        (json.dumps({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}).encode(), "describes no tensor"),
        (json.dumps({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}).encode(), "describes no tensor"),
        (json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(), "another size than its shape"),
        (json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}).encode(), "ends before it begins"),
        (json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode(), "describes no tensor"),
        (json.dumps({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}).encode(), "describes no tensor"),
        (json.dumps({"a": entry([64], 0), "b": entry([64], 0)}).encode(), "tensors overlap"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused_with_their_reason(tmp_path: Path, header: bytes, reason: str) -> None:
    assert reason in refusal(write(tmp_path / "m.safetensors", header, data=128))


@pytest.mark.parametrize("length", [0, 1, 1 << 24 | 1, 1 << 62, (1 << 64) - 1])
def test_an_impossible_header_length_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(path, 1 << 40)
    assert f"its header would be {length} bytes long" in refusal(path)


def test_what_is_no_regular_file_is_refused_without_waiting(model: Path) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert "it is not a file" in refusal(model)
    assert "no .safetensors file is in it" in refusal(_empty(model))


def _empty(model: Path) -> Path:
    (model / "empty").mkdir()
    return model / "empty"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 260), st.binary(min_size=1, max_size=9)), max_size=5),
    cut=st.none() | st.integers(0, 300),
)
def test_damage_gives_a_shape_or_a_refusal_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    raw = bytearray(write(path, {"a": entry([8, 8], 0), "lm_head.weight": entry([8], 128)}).read_bytes())
    for at, new in edits:
        raw[at : at + len(new)] = new
    path.write_bytes(raw[:cut])
    try:
        assert isinstance(read_safetensors_shape(str(path)), ModelShape)
    except SpecError as error:
        assert error.message.startswith("cannot use ")
