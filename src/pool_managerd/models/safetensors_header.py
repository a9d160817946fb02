"""Headers of safetensors files and the config.json beside them: the shape of a model for vLLM, TGI and their like."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pool_managerd.core.memory.model_shape import ModelShape, SlidingWindow
from pool_managerd.errors import SpecError
from pool_managerd.models.byte_reader import FileSource, Source, regular_file
from pool_managerd.models.gguf import head_of

MAX_HEADER_BYTES = 16 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_FILES = 2_048
MAX_TENSORS = 131_072
MAX_NESTS, MAX_COMMAS = 3 * MAX_TENSORS + 1_024, 12 * MAX_TENSORS
"""Objects, lists and commas in one JSON text: what so many tensors need. Parsed, a few bytes of text can cost a hundred."""

MAX_NAME_CHARS = 1_024
MAX_DIMS = 8
MAX_LAYERS = 4_096
MAX_FACT = 1 << 40
CONFIG, INDEX = "config.json", "model.safetensors.index.json"

_DTYPE_BITS = MappingProxyType({
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32,
    "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
})  # fmt: skip
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_INPUT = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings|wte|tok_embeddings)\.weight")
_OUTPUT = re.compile(r"(?:.*\.)?(?:lm_head|output|embed_out)\.weight")


def read_safetensors_shape(path: str) -> ModelShape:
    """The shape of the model in the folder ``path``, or in one file beside its config.json.

    A folder's files are those that its index names, else all ``*.safetensors`` in it. Blocking. Raises SpecError when
    something is missing, damaged, hostile or not downloaded completely; facts that config.json does not tell are None.
    """
    try:
        return _read(Path(path))
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror})") from error


def is_safetensors(path: str) -> bool:
    """True when ``path`` begins like such a file, whatever it is called: a length, then a JSON object."""
    head = head_of(path)
    return len(head) > 8 and 2 <= struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES and head[8:9] == b"{"


def _read(path: Path) -> ModelShape:
    folder = path if path.is_dir() else path.parent
    files = _files(folder) if path.is_dir() else [path]
    return _shape(_config(folder), _together((str(file), _header(str(file))) for file in files), len(files))


def shape_of_headers(config: bytes, headers: Sequence[tuple[str, Iterable[tuple[str, str, int]]]]) -> ModelShape:
    """The shape by what config.json holds, and each file's name and tensors. Raises SpecError."""
    return _shape(_of_text(_parse(CONFIG, config)), _together(headers), len(headers))


def _together(headers: Iterable[tuple[str, Iterable[tuple[str, str, int]]]]) -> dict[str, tuple[str, int]]:
    tensors: dict[str, tuple[str, int]] = {}
    for file, found in headers:
        for name, dtype, size_bytes in found:
            if name in tensors:
                raise _refused(file, f"the tensor {name[:80]!r} is in another file as well")
            tensors[name] = (dtype, size_bytes)
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        index = _object(str(folder / INDEX), MAX_INDEX_BYTES)
        named = index.get("weight_map")
        names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
        for name in names:
            if name != os.path.basename(name) or not name.endswith(".safetensors"):  # noqa: PTH119 - a text, not yet a path
                raise _refused(str(folder / INDEX), f"it names the file {name[:80]!r}, which does not lie beside it")
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise _refused(str(folder), f"{len(missing)} of its {len(names)} files are missing, first {missing[0]}")
    else:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".safetensors"))
        # Some repositories carry the whole model a second time in one piece.
        names = [name for name in names if _SHARD.fullmatch(name) or not name.startswith("consolidated")] or names
    if not names:
        raise _refused(str(folder), "no .safetensors file is in it")
    if len(names) > MAX_FILES:
        raise _refused(str(folder), f"it has {len(names)} files, more than {MAX_FILES}")
    return [folder / name for name in names]


def _header(path: str) -> Iterable[tuple[str, str, int]]:
    """Name, type and size in bytes of each tensor of one file, checked against the file's own size."""
    with regular_file(path, partial(_refused, path)) as fd:
        return tensors_in(path, FileSource(fd))


def tensors_in(path: str, source: Source) -> Iterable[tuple[str, str, int]]:
    """The same of ``source``, which errors call ``path``."""
    size = source.size
    head = source.read(0, min(8, size), 8)[:8]
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise _refused(path, f"its header would be {length} bytes long; it is no such file, or not filled yet")
    if 8 + length > size:
        raise _refused(path, "it ends within its header: the download is not complete")
    header = _parse(path, source.read(8, length, length))
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _refused(path, f"it has {len(header)} tensors, more than {MAX_TENSORS}")
    found = [_tensor(path, name, entry) for name, entry in header.items()]
    needed = 8 + length + max((end for *_, end in found), default=0)
    if needed > size:
        raise _refused(path, f"it has {size} bytes of the {needed} that its tensors need: the download is not complete")
    if 8 + length + sum(end - start for _, _, start, end in found) > size:
        raise _refused(path, "its tensors overlap")
    return [(name, dtype, end - start) for name, dtype, start, end in found]


def _tensor(path: str, name: str, entry: Any) -> tuple[str, str, int, int]:
    shown = name[:80]
    if len(name) > MAX_NAME_CHARS or not isinstance(entry, dict):
        raise _refused(path, f"its entry {shown!r} describes no tensor")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dims, places = _sizes(shape, MAX_DIMS), _sizes(offsets, 2)
    if not isinstance(dtype, str) or dims is None or places is None or len(places) != 2:
        raise _refused(path, f"its entry {shown!r} describes no tensor")
    start, end = places
    if start > end:
        raise _refused(path, f"the tensor {shown!r} ends before it begins")
    bits = _DTYPE_BITS.get(dtype)
    if bits is not None and -(-math.prod(dims) * bits // 8) != end - start:
        raise _refused(path, f"the tensor {shown!r} has another size than its shape says")
    return name, dtype[:16], start, end


def _sizes(value: Any, most: int) -> list[int] | None:
    """``value`` when it is a list of at most ``most`` sizes."""
    if not isinstance(value, list) or len(value) > most:
        return None
    sound = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= 1 << 53 for item in value)
    return value if sound else None


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json, its part for the language model where it has several; empty when there is none."""
    path = folder / CONFIG
    if not path.exists():
        return {}
    return _of_text(_object(str(path), MAX_CONFIG_BYTES))


def _of_text(config: dict[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _object(path: str, limit: int) -> dict[str, Any]:
    with regular_file(path, partial(_refused, path)) as fd:
        if os.fstat(fd).st_size > limit:
            raise _refused(path, f"it is longer than {limit} bytes")
        return _parse(path, os.pread(fd, limit, 0))


def _parse(path: str, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    if raw.count(b"[") + raw.count(b"{") > MAX_NESTS or raw.count(b",") > MAX_COMMAS:
        raise _refused(path, f"its JSON has more parts than {MAX_TENSORS} tensors need")
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise _refused(path, f"its JSON cannot be read ({reason})") from error
    if not isinstance(parsed, dict):
        raise _refused(path, "its JSON is no object")
    return parsed


def _shape(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, int]], parts: int) -> ModelShape:
    n_layers, n_heads, n_embd = (_fact(config, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    n_layers = n_layers if n_layers is not None and n_layers <= MAX_LAYERS else None
    kv_heads = _fact(config, "num_key_value_heads") or n_heads
    head = _fact(config, "head_dim") or (n_embd // n_heads if n_embd and n_heads else None)
    value = head
    latent, rope = _fact(config, "kv_lora_rank"), _fact(config, "qk_rope_head_dim")
    if latent is not None and rope is not None:
        kv_heads, head, value = 1, latent + rope, latent
    used = _fact(config, "num_experts_per_tok") or 0
    widths = (_fact(config, "intermediate_size") or 0, used * (_fact(config, "moe_intermediate_size") or 0))
    output = sum(size for name, (_, size) in tensors.items() if _OUTPUT.fullmatch(name))
    return ModelShape(
        architecture=_architecture(config),
        weights_bytes=sum(size for _, size in tensors.values()),
        n_layers=n_layers,
        n_embd=n_embd,
        n_vocab=_fact(config, "vocab_size"),
        n_heads=n_heads,
        kv_heads=(kv_heads,) * n_layers if n_layers is not None and kv_heads is not None else None,
        key_length=head,
        value_length=value,
        feed_forward=max(widths) or None,
        ctx_train=_fact(config, "max_position_embeddings"),
        window=_window(config, n_layers),
        latent_cache=latent is not None,
        n_experts=next((n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := _fact(config, key))), 0),
        n_experts_used=used,
        input_bytes=sum(size for name, (_, size) in tensors.items() if _INPUT.fullmatch(name)),
        output_bytes=output,
        tied_output=not output,
        quantization=_quantization(config, tensors),
        parts=parts,
    )


def _fact(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_FACT else None


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("model_type")
    return named[:80] if isinstance(named, str) and named else "unknown"


def _window(config: Mapping[str, Any], n_layers: int | None) -> SlidingWindow | None:
    tokens = _fact(config, "sliding_window")
    if tokens is None or config.get("use_sliding_window") is False:
        return None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and n_layers is not None and len(kinds) >= n_layers:
        return SlidingWindow(tokens, tuple(kind == "sliding_attention" for kind in kinds[:n_layers]))
    return SlidingWindow(tokens)


def _quantization(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, int]]) -> str | None:
    method = config.get("quantization_config")
    named = method.get("quant_method") if isinstance(method, dict) else None
    if isinstance(named, str):
        return named[:32]
    weight: Counter[str] = Counter()
    for dtype, size in tensors.values():
        weight[dtype] += size
    return next((dtype for dtype, _ in weight.most_common(1)), None)


def _refused(path: str, reason: str) -> SpecError:
    return SpecError(
        f"cannot use {path} as a safetensors model: {reason}", hint="check the download: config.json and every .safetensors file"
    )
