"""The buffers beside the weights, by the engine's own formulas; tests/engines holds these against a real one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.memory import llamacpp_buffers as buffers
from pool_managerd.core.memory.llamacpp_buffers import EngineSettings
from pool_managerd.core.memory.model_shape import ModelShape, Recurrent, SlidingWindow

SMALL = ModelShape(
    "llama", 4_000_000, n_layers=2, n_embd=64, n_vocab=1000, n_heads=4, kv_heads=(2, 1), key_length=32, value_length=16,
    feed_forward=128, ctx_train=2000,
)  # fmt: skip


def settings(**changes: Any) -> EngineSettings:
    return replace(EngineSettings(ctx=1024), **changes)


@pytest.mark.parametrize(
    ("changes", "cells"),
    [({}, 1024), ({"ctx": 0}, 2048), ({"ctx": 1}, 256), ({"parallel": 3}, 512), ({"parallel": 0}, 1024),
     ({"parallel": 3, "kv_unified": True}, 1024)],
)  # fmt: skip
def test_each_sequence_has_whole_blocks_of_cells(changes: dict[str, Any], cells: int) -> None:
    assert buffers.cells_per_sequence(SMALL, settings(**changes)) == cells
    assert buffers.cells_per_sequence(ModelShape("x", 0), settings(ctx=0)) == 4096


def test_the_cache_is_keys_and_values_of_each_layers_heads() -> None:
    assert buffers.kv_bytes_by_layer(SMALL, settings()) == (2 * (32 + 16) * 2 * 1024, 1 * (32 + 16) * 2 * 1024)
    assert buffers.kv_bytes_by_layer(replace(SMALL, latent_cache=True), settings()) == (2 * 32 * 2 * 1024, 32 * 2 * 1024)
    assert buffers.kv_bytes_by_layer(SMALL, settings(parallel=2)) == buffers.kv_bytes_by_layer(SMALL, settings())
    assert buffers.kv_bytes_by_layer(SMALL, settings(parallel=2, kv_unified=True)) == buffers.kv_bytes_by_layer(SMALL, settings())
    assert buffers.kv_bytes_by_layer(SMALL, settings(cache_type_k="?", cache_type_v="?"))[0] == 2 * (32 + 16) * 4 * 1024  # type: ignore[index]
    assert buffers.kv_bytes_by_layer(replace(SMALL, kv_heads=(0, 0)), settings()) == (0, 0)
    for unknown in ({"kv_heads": None}, {"key_length": None}, {"value_length": None}):
        assert buffers.kv_bytes_by_layer(replace(SMALL, **unknown), settings()) is None  # type: ignore[arg-type]


def test_a_window_has_heads_of_its_own_and_a_micro_batch_more_than_its_tokens() -> None:
    windowed = replace(SMALL, window=SlidingWindow(100, (True, False), key_length=8, value_length=4))
    assert buffers.kv_bytes_by_layer(windowed, settings(ubatch=150)) == (2 * (8 + 4) * 2 * 256, (32 + 16) * 2 * 1024)
    window = SlidingWindow(100)
    assert buffers.window_cells(window, settings(ubatch=412), 1024) == 512
    assert buffers.window_cells(window, settings(ubatch=413), 1024) == 768
    assert buffers.window_cells(window, settings(ubatch=112, parallel=4), 1024) == 256
    assert buffers.window_cells(window, settings(ubatch=112, parallel=4, kv_unified=True), 1024) == 512
    assert buffers.window_cells(window, settings(ubatch=4096), 1024) == buffers.window_cells(
        window, settings(swa_full=True), 1024
    )


def test_an_unknown_cache_is_taken_to_be_as_large_as_the_weights_at_40000_tokens() -> None:
    assert buffers.assumed_kv_bytes(SMALL, settings()) == 1024 * 100
    assert buffers.assumed_kv_bytes(SMALL, settings(parallel=2)) == 1024 * 100
    assert buffers.assumed_kv_bytes(replace(SMALL, weights_bytes=1), settings()) == 1024


def test_states_are_kept_for_each_slot_and_copy() -> None:
    assert buffers.state_bytes(SMALL, settings()) == 0
    mamba = replace(SMALL, recurrent=Recurrent(7))
    assert [buffers.state_bytes(mamba, settings(parallel=n, state_copies=3)) for n in (0, 1, 4)] == [21, 21, 84]


def test_what_is_computed_at_once_is_the_widest_layer_of_a_micro_batch_and_its_mask() -> None:
    mask = 1024 * 2
    assert buffers.compute_bytes(SMALL, settings()) == 512 * (4 * (3 * 128 + 3 * 64) + mask)
    assert buffers.compute_bytes(SMALL, settings(ctx=256)) == 256 * (4 * (3 * 128 + 3 * 64) + 256 * 2)
    assert buffers.compute_bytes(SMALL, settings(ctx=0)) == 512 * (4 * (3 * 128 + 3 * 64) + 2048 * 2)
    assert buffers.compute_bytes(replace(SMALL, feed_forward=None), settings()) == 512 * (4 * (3 * 4 * 64 + 3 * 64) + mask)
    experts = replace(SMALL, n_experts_used=8)
    assert buffers.compute_bytes(experts, settings()) == 512 * (4 * (3 * 128 + 8 * 64 + 3 * 64) + mask)
    plain = buffers.compute_bytes(SMALL, settings(flash_attn=False))
    assert plain == 512 * (4 * (4 * 1024 + 6 * 64) + 1024 * 4), "attention is computed in full"
    wide = replace(SMALL, recurrent=Recurrent(1, width=1000))
    assert buffers.compute_bytes(wide, settings()) == 512 * (4 * (3 * 1000 + 2 * 64) + mask)
    assert buffers.compute_bytes(ModelShape("x", 0), settings()) == 512 * ((1 << 20) + 1024 * 2)


def test_logits_of_many_slots_or_of_a_whole_batch_may_be_larger() -> None:
    loud = replace(SMALL, n_vocab=1_000_000)
    assert buffers.compute_bytes(loud, settings(parallel=4)) == 4 * 1_000_000 * 4
    assert buffers.compute_bytes(loud, settings(parallel=0, ubatch=1)) == 4 * 1_000_000
    assert buffers.compute_bytes(loud, settings(all_logits=True)) == 4 * 1_000_000 * 512


def test_the_mask_of_an_encoder_is_its_batch_and_a_model_without_a_cache_has_none() -> None:
    encoder = replace(SMALL, encoder=True, feed_forward=1)
    assert buffers.host_compute_bytes(encoder, settings()) == 512 * 4 * 2 * 64 + 512 * 512 * 2 + 4 * 1000
    assert buffers.host_compute_bytes(encoder, settings(flash_attn=False)) == 512 * 4 * 2 * 64 + 512 * 512 * 4 + 4 * 1000
    assert buffers.compute_bytes(encoder, settings(flash_attn=False)) == 512 * (4 * (4 * 512 + 6 * 64) + 512 * 4)
    mamba = replace(SMALL, kv_heads=(0, 0))
    assert buffers.host_compute_bytes(mamba, settings(parallel=3)) == 512 * 4 * 2 * 64 + 3 * 4 * 1000
    windowed = replace(SMALL, window=SlidingWindow(100, (True, False)))
    more = buffers.host_compute_bytes(windowed, settings()) - buffers.host_compute_bytes(SMALL, settings())
    assert more == 512 * 768 * 2, "windowed layers have a mask of their own"


def test_several_gpus_keep_three_further_copies_of_a_micro_batch() -> None:
    assert buffers.pipeline_bytes(SMALL, settings()) == 3 * 512 * (4 * 64 + 1024 * 2)


def test_a_draft_model_has_its_own_cache_types_and_nothing_of_the_main_ones_rules() -> None:
    whole = settings(draft=SMALL, draft_cache_type_k="q8_0", draft_cache_type_v="q4_0", state_copies=3, file_bytes=5)
    assert whole.of_draft == settings(
        cache_type_k="q8_0", cache_type_v="q4_0", draft_cache_type_k="q8_0", draft_cache_type_v="q4_0"
    )
