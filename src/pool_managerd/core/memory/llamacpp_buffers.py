"""The buffers that llama-server allocates beside the weights, from the model's shape and the launch's settings.

The formulas follow what the engine does; tests/engines/test_llamacpp_memory.py holds them against it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pool_managerd.core.memory.model_shape import ModelShape, SlidingWindow
from pool_managerd.core.memory.tensor_places import PlaceRule
from pool_managerd.core.memory.tensor_types import row_bytes

CELL_BLOCK = 256
"""Contexts are rounded up to so many tokens, per sequence."""

ASSUMED_CTX = 4_096
ASSUMED_TOKENS_PER_WEIGHTS = 40_000
"""Where the header tells no KV cache: a cache for so many tokens is taken to be as large as the weights."""

ASSUMED_COMPUTE_BYTES_PER_TOKEN = 1 << 20
PIPELINE_COPIES = 4

_FLOAT = 4
# Values that live at once for each token of a micro-batch, by layer: measured, in widths of the feed-forward and of the stream.
_FEED_FORWARDS, _STREAMS, _STREAMS_IN_ATTENTION, _STREAMS_ON_HOST, _STATE_WIDTHS = 3, 3, 6, 2, 3


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What decides llama-server's memory, with its defaults. ``ctx`` is the total over ``parallel`` slots, 0 the model's own.

    ``gpu_layers`` None: all layers are on the GPU; 0: none. ``file_bytes`` are weights beside the model (projector,
    adapters). ``all_logits``: builds before the ``n_outputs_max`` limit keep logits of a whole micro-batch.
    ``state_copies``: how often each recurrent state is kept, for speculation to go back to. ``rules`` keep weights in RAM.
    ``only_device``: of several GPUs it uses this one alone; ``shares``: how it divides the model among them, where it says
    so. ``unmodelled`` are flags whose effect is not counted here.
    """

    ctx: int = 0
    parallel: int = 1
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    ubatch: int = 512
    flash_attn: bool = True
    kv_unified: bool = False
    kv_on_gpu: bool = True
    swa_full: bool = False
    gpu_layers: int | None = None
    cache_ram_bytes: int | None = 8192 << 20
    all_logits: bool = False
    file_bytes: int = 0
    draft: ModelShape | None = None
    draft_cache_type_k: str = "f16"
    draft_cache_type_v: str = "f16"
    state_copies: int = 1
    rules: tuple[PlaceRule, ...] = ()
    only_device: int | None = None
    shares: tuple[float, ...] = ()
    unmodelled: tuple[str, ...] = ()

    @property
    def of_draft(self) -> EngineSettings:
        """What holds for the draft model, which has cache types of its own."""
        k, v = self.draft_cache_type_k, self.draft_cache_type_v
        return replace(self, draft=None, cache_type_k=k, cache_type_v=v, state_copies=1, rules=(), file_bytes=0)


def cells_per_sequence(shape: ModelShape, settings: EngineSettings) -> int:
    """Tokens that one sequence's cache has room for; of a unified cache, all sequences together."""
    ctx = _padded(settings.ctx or shape.ctx_train or ASSUMED_CTX)
    return ctx if settings.kv_unified else _padded(ctx // max(1, settings.parallel))


def window_cells(window: SlidingWindow, settings: EngineSettings, cells: int) -> int:
    """Cells of a layer that looks back a window only: the window and one micro-batch."""
    if settings.swa_full:
        return cells
    windows = window.tokens * (settings.parallel if settings.kv_unified else 1)
    return min(cells, _padded(windows + settings.ubatch))


def kv_bytes_by_layer(shape: ModelShape, settings: EngineSettings) -> tuple[int, ...] | None:
    """KV cache of each layer over all slots; None where the header does not tell."""
    if shape.kv_heads is not None and not any(shape.kv_heads):
        return (0,) * len(shape.kv_heads)
    if shape.kv_heads is None or shape.key_length is None or shape.value_length is None:
        return None
    cells = cells_per_sequence(shape, settings)
    streams = 1 if settings.kv_unified else max(1, settings.parallel)
    window = shape.window
    sizes = []
    for layer, heads in enumerate(shape.kv_heads):
        here, key, value = cells, shape.key_length, shape.value_length
        if window is not None and window.layers is not None and window.layers[layer]:
            here = window_cells(window, settings, cells)
            key, value = window.key_length or key, window.value_length or value
        row = _row(settings.cache_type_k, heads * key)
        row += 0 if shape.latent_cache else _row(settings.cache_type_v, heads * value)
        sizes.append(row * here * streams)
    return tuple(sizes)


def assumed_kv_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """A cache like that of models with as many weights, generously."""
    streams = 1 if settings.kv_unified else max(1, settings.parallel)
    return cells_per_sequence(shape, settings) * streams * max(1, shape.weights_bytes // ASSUMED_TOKENS_PER_WEIGHTS)


def state_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """State of recurrent layers over all slots."""
    if shape.recurrent is None:
        return 0
    return shape.recurrent.bytes_per_sequence * max(1, settings.parallel) * settings.state_copies


def compute_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """Scratch memory for one micro-batch, on each device that computes layers."""
    tokens = min(settings.ubatch, max(CELL_BLOCK, settings.ctx or settings.ubatch))
    mask = _mask_bytes(shape, settings)
    if shape.n_embd is None:
        return tokens * (ASSUMED_COMPUTE_BYTES_PER_TOKEN + mask)
    cells = cells_per_sequence(shape, settings)
    feed_forward = _FEED_FORWARDS * (shape.feed_forward or 4 * shape.n_embd) + shape.n_experts_used * shape.n_embd
    widest = feed_forward + _STREAMS * shape.n_embd
    if shape.recurrent is not None:
        widest = max(widest, _STATE_WIDTHS * shape.recurrent.width + _STREAMS_ON_HOST * shape.n_embd)
    if shape.encoder:
        cells = tokens
    if not settings.flash_attn:
        widest = max(widest, (shape.n_heads or 1) * cells + _STREAMS_IN_ATTENTION * shape.n_embd)
    logits = _FLOAT * (shape.n_vocab or 0) * (tokens if settings.all_logits else max(1, settings.parallel))
    return max(tokens * (_FLOAT * widest + mask), logits)


def pipeline_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """Further copies of each micro-batch's input, with which several GPUs work on several micro-batches at once."""
    return (PIPELINE_COPIES - 1) * settings.ubatch * (_FLOAT * (shape.n_embd or 0) + _mask_bytes(shape, settings))


def host_compute_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """What stays in RAM when the layers are on a GPU: embedded tokens, masks, and logits to sample from."""
    logits = _FLOAT * (shape.n_vocab or 0) * max(1, settings.parallel)
    embedded = settings.ubatch * _FLOAT * _STREAMS_ON_HOST * (shape.n_embd or 0)
    return embedded + settings.ubatch * _mask_bytes(shape, settings) + logits


def _mask_bytes(shape: ModelShape, settings: EngineSettings) -> int:
    """Which cells a token may see, per token of a micro-batch; windowed layers have a mask of their own."""
    cells = cells_per_sequence(shape, settings)
    if shape.encoder:
        return settings.ubatch * (2 if settings.flash_attn else _FLOAT)
    if not any(shape.kv_heads or (1,)):
        return 0
    if shape.window is not None and shape.window.layers is not None:
        cells += window_cells(shape.window, settings, cells)
    return cells * (2 if settings.flash_attn else _FLOAT)


def _row(type_name: str, values: int) -> int:
    known = row_bytes(type_name, values)
    return _FLOAT * values if known is None else known


def _padded(tokens: int) -> int:
    return max(1, -(-tokens // CELL_BLOCK)) * CELL_BLOCK
