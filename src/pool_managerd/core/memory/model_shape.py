"""What a model's header tells about the memory that it will need: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Task = Literal["generate", "embed", "rerank"]
"""What a model can be asked for."""


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Attention that looks back only ``tokens`` tokens, in the layers where ``layers`` is True; None: which ones is unknown.

    ``key_length`` and ``value_length`` are set where heads of these layers differ from the others'.
    """

    tokens: int
    layers: tuple[bool, ...] | None = None
    key_length: int | None = None
    value_length: int | None = None


@dataclass(frozen=True, slots=True)
class Recurrent:
    """State of fixed size per sequence (Mamba, RWKV, linear attention): ``bytes_per_sequence`` over all its layers.

    ``width``: numbers that one token is spread to within such a layer.
    """

    bytes_per_sequence: int
    width: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What an estimate needs to know. What is not known is None and makes the estimate wider.

    ``weights_bytes`` counts the tensors of all parts of a split model, ``input_bytes`` the token embedding among them
    (llama.cpp keeps it in RAM), ``output_bytes`` the output matrix. ``tied_output``: there is none, and an
    engine uses the token embedding a second time. ``kv_heads`` has an entry per layer, 0 where a layer has no KV
    cache. ``latent_cache``: compressed attention (MLA) that stores no values beside the keys. ``feed_forward`` is the
    widest layer's width as it is computed for one token. ``unsure_cache``: the header tells of caches that are not counted;
    ``known``: the architecture is one whose memory is understood. ``encoder``: it reads whole texts and keeps no cache.
    ``tensors`` are names and sizes in bytes, for rules that place some of them elsewhere; empty where there are too many.
    """

    architecture: str
    weights_bytes: int
    n_layers: int | None = None
    n_embd: int | None = None
    n_vocab: int | None = None
    n_heads: int | None = None
    kv_heads: tuple[int, ...] | None = None
    key_length: int | None = None
    value_length: int | None = None
    feed_forward: int | None = None
    ctx_train: int | None = None
    window: SlidingWindow | None = None
    recurrent: Recurrent | None = None
    latent_cache: bool = False
    n_experts: int = 0
    n_experts_used: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    tied_output: bool = False
    quantization: str | None = None
    parts: int = 1
    unsure_cache: bool = False
    known: bool = True
    encoder: bool = False
    task: Task = "generate"
    tensors: tuple[tuple[str, int], ...] = field(default=(), repr=False, compare=False)

    @property
    def plain_cache(self) -> bool:
        """True when the KV cache is of a kind whose size was held against a real engine's."""
        if self.kv_heads is not None and not any(self.kv_heads):
            return self.recurrent is not None
        told = self.window is None or self.window.layers is not None
        return told and not self.unsure_cache and None not in (self.kv_heads, self.key_length, self.value_length)
