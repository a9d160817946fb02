"""From the headers of a GGUF model to the facts that decide its memory. Split models are read part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from pool_managerd.core.memory.model_shape import ModelShape, Recurrent, SlidingWindow, Task
from pool_managerd.models import gguf_families as families
from pool_managerd.models.gguf_header import ArrayValue, GgufHeader, TensorInfo, Value, read_gguf_header
from pool_managerd.models.gguf_parts import other_parts

MAX_LAYERS = 4_096
MAX_FACT = 1 << 40

_INPUTS = ("token_embd.weight", "token_embd_norm.weight", "token_types.weight", "position_embd.weight")
_OUTPUT = "output.weight"

MAX_TENSORS_KEPT = 8_192
_STATE_ELEMENT_BYTES = 4
_POOLED, _RANKED = (1, 2, 3), 4

_FILE_TYPES = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S",
    22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS",
    31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
})  # fmt: skip


def read_gguf_shape(path: str) -> ModelShape:
    """The shape of the model at ``path``; of a split one, ``path`` is the first part and all must lie beside it.

    Blocking. Raises SpecError when a part is missing, damaged, hostile or not downloaded completely.
    """
    first = read_gguf_header(path)
    headers = [first, *(read_gguf_header(part) for part in other_parts(path, first.values))]
    return shape_of_headers(headers)


def shape_of_headers(headers: Sequence[GgufHeader]) -> ModelShape:
    """The shape that the headers of all parts of one model tell, those of the first part first."""
    return _shape(headers[0].values, headers)


def _shape(values: Mapping[str, Value], headers: Sequence[GgufHeader]) -> ModelShape:
    tensors = [tensor for header in headers for tensor in header.tensors]
    facts = _Facts(values)
    n_layers, n_embd, n_heads = facts.number("block_count"), facts.number("embedding_length"), facts.most("attention.head_count")
    head = n_embd // n_heads if n_embd and n_heads else None
    used = facts.number("expert_used_count") or 0
    output = sum(t.size_bytes for t in tensors if t.name == _OUTPUT)
    shape = ModelShape(
        architecture=facts.architecture,
        weights_bytes=sum(t.size_bytes for t in tensors),
        n_layers=n_layers,
        n_embd=n_embd,
        n_vocab=_vocabulary(facts, values, tensors),
        n_heads=n_heads,
        key_length=facts.number("attention.key_length") or head,
        value_length=facts.number("attention.value_length") or head,
        feed_forward=max(facts.most("feed_forward_length") or 0, used * (facts.most("expert_feed_forward_length") or 0)) or None,
        ctx_train=facts.number("context_length"),
        latent_cache=facts.number("attention.key_length_mla") is not None,
        n_experts=facts.number("expert_count") or 0,
        n_experts_used=used,
        input_bytes=sum(t.size_bytes for t in tensors if t.name in _INPUTS),
        output_bytes=output,
        tied_output=not output and any(t.name == _INPUTS[0] for t in tensors),
        quantization=_quantization(values, tensors),
        parts=len(headers),
        known=facts.architecture in families.KNOWN,
        encoder=facts.architecture in families.ENCODERS or facts.architecture in families.CACHELESS,
        task=_task(facts),
        tensors=tuple((t.name, t.size_bytes) for t in tensors) if len(tensors) <= MAX_TENSORS_KEPT else (),
    )
    if n_layers is None or n_layers > MAX_LAYERS:
        return replace(shape, n_layers=None)
    recurrent = _recurrent_layers(facts, n_layers)
    return replace(
        shape,
        kv_heads=_kv_heads(facts, n_layers, recurrent),
        window=_window(facts, n_layers),
        recurrent=_recurrent(facts, sum(recurrent), n_embd, n_heads),
        unsure_cache=facts.raw("attention.indexer.head_count") is not None,
    )


class _Facts:
    """Numbers of one architecture by key; a value of the wrong kind or an absurd size is none."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        name = values.get("general.architecture")
        self.architecture = name if isinstance(name, str) and name else "unknown"
        self._values = values

    def raw(self, key: str) -> Value | None:
        return self._values.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> int | None:
        return _whole(self.raw(key))

    def per_layer(self, key: str, n_layers: int) -> tuple[int, ...] | None:
        """One number per layer, from an array or from one number for all."""
        value = self.raw(key)
        if isinstance(value, ArrayValue):
            found = [_whole(item) for item in value.items or ()]
            known = tuple(number for number in found if number is not None)
            return known[:n_layers] if len(known) == len(found) >= n_layers else None
        one = _whole(value)
        return None if one is None else (one,) * n_layers

    def most(self, key: str) -> int | None:
        value = self.raw(key)
        if isinstance(value, ArrayValue):
            return max((number for item in value.items or () if (number := _whole(item)) is not None), default=None)
        return _whole(value)


def _whole(value: Value | None) -> int | None:
    return int(value) if isinstance(value, int) and 0 <= value <= MAX_FACT else None


def _vocabulary(facts: _Facts, values: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> int | None:
    tokens = values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, ArrayValue):
        return tokens.length
    embedding = next((t for t in tensors if t.name == _INPUTS[0] and len(t.dims) > 1), None)
    return facts.number("vocab_size") or (embedding.dims[1] if embedding else None)


def _task(facts: _Facts) -> Task:
    """What the model is made for. A decoder that pools over its tokens embeds, or scores, unless it is told otherwise."""
    pooling = facts.number("pooling_type")
    if pooling == _RANKED:
        return "rerank"
    return "embed" if facts.architecture in families.ENCODERS or pooling in _POOLED else "generate"


def _recurrent_layers(facts: _Facts, n_layers: int) -> tuple[bool, ...]:
    """Which layers keep a state of fixed size instead of, or beside, a KV cache."""
    stateful = any(facts.raw(key) is not None for key in ("ssm.inner_size", "wkv.head_size", "shortconv.l_cache", "kda.head_dim"))
    if facts.architecture in families.ALL_RECURRENT or facts.architecture in families.BOTH_IN_EACH_LAYER:
        return (True,) * n_layers
    if facts.architecture in families.EVERY_FOURTH_ATTENDS:
        every = facts.number("full_attention_interval") or 4
        return tuple((layer + 1) % every != 0 for layer in range(n_layers))
    heads = facts.per_layer("attention.head_count_kv", n_layers)
    widths = facts.per_layer("feed_forward_length", n_layers)
    if facts.architecture in families.THREE_KINDS_OF_LAYER and heads and widths:
        return tuple(count == 0 and width == 0 for count, width in zip(heads, widths, strict=True))
    return tuple(stateful and count == 0 for count in heads) if heads else (stateful,) * n_layers


def _kv_heads(facts: _Facts, n_layers: int, recurrent: tuple[bool, ...]) -> tuple[int, ...] | None:
    heads = facts.per_layer("attention.head_count_kv", n_layers) or facts.per_layer("attention.head_count", n_layers)
    if facts.architecture in families.ALL_RECURRENT:
        return (0,) * n_layers
    if heads is None:
        return None
    # Layers at the end predict further tokens, or share the cache of earlier ones: they have none of their own.
    without = (facts.number("nextn_predict_layers") or 0) + (facts.number("attention.shared_kv_layers") or 0)
    own = max(1, n_layers - without)
    blocked = facts.architecture not in families.BOTH_IN_EACH_LAYER
    return tuple(0 if layer >= own or (recurrent[layer] and blocked) else count for layer, count in enumerate(heads))


def _window(facts: _Facts, n_layers: int) -> SlidingWindow | None:
    tokens = facts.number("attention.sliding_window")
    fixed = families.FIXED_WINDOWS.get(facts.architecture)
    if fixed is not None and tokens != 0:
        tokens = fixed
    if not tokens or facts.architecture in families.WINDOWLESS:
        return None
    pattern = facts.raw("attention.sliding_window_pattern")
    sizes = (facts.number("attention.key_length_swa"), facts.number("attention.value_length_swa"))
    if isinstance(pattern, ArrayValue):
        flags = tuple(bool(item) for item in pattern.items or ())
        return SlidingWindow(tokens, flags[:n_layers] if len(flags) >= n_layers else None, *sizes)
    period = _whole(pattern) or families.WINDOW_PERIODS.get(facts.architecture)
    if not period:
        return SlidingWindow(tokens, None, *sizes)
    if facts.architecture in families.DENSE_FIRST:
        return SlidingWindow(tokens, tuple(layer % period != 0 for layer in range(n_layers)), *sizes)
    return SlidingWindow(tokens, tuple(layer % period < period - 1 for layer in range(n_layers)), *sizes)


def _recurrent(facts: _Facts, n_layers: int, n_embd: int | None, n_heads: int | None) -> Recurrent | None:
    if not n_layers:
        return None
    inner, state = facts.number("ssm.inner_size"), facts.number("ssm.state_size")
    kernel, groups = facts.number("ssm.conv_kernel"), facts.number("ssm.group_count") or 0
    wkv, short, kda = facts.number("wkv.head_size"), facts.number("shortconv.l_cache"), facts.number("kda.head_dim")
    width = 0
    if kda and n_heads:
        numbers = 3 * ((kernel or 4) - 1) * n_heads * kda + kda * kda * n_heads
        width = 4 * n_heads * kda
    elif inner and state and kernel:
        numbers = (kernel - 1) * (inner + 2 * groups * state) + state * inner
        width = 2 * (inner + groups * state) + (facts.number("ssm.time_step_rank") or 0)
    elif wkv and n_embd:
        numbers = (facts.number("token_shift_count") or 2) * n_embd + n_embd * wkv
    elif short and n_embd:
        numbers = (short - 1) * n_embd
    else:
        return None
    return Recurrent(n_layers * numbers * _STATE_ELEMENT_BYTES, width)


def _quantization(values: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> str | None:
    kind = _whole(values.get("general.file_type"))
    if kind is not None and kind in _FILE_TYPES:
        return _FILE_TYPES[kind]
    weight: Counter[str] = Counter()
    for tensor in tensors:
        weight[tensor.type_name] += tensor.size_bytes
    return next((name for name, _ in weight.most_common(1) if name), None)
