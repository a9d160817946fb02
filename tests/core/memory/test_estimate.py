"""What an engine will allocate: the parts, their sum per GPU, and that more context or slots never need less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.memory.estimate import DeviceFraction, EngineSettings, MemoryEstimate, estimate
from pool_managerd.core.memory.measurements import Measurement
from pool_managerd.core.memory.model_shape import ModelShape, Recurrent, SlidingWindow
from pool_managerd.core.memory.tensor_places import PlaceRule

MIB, GIB = 1 << 20, 1 << 30
OVERHEAD = 512 * MIB

LLAMA_8B = ModelShape(
    architecture="llama", weights_bytes=4_920_000_000, n_layers=32, n_embd=4096, n_vocab=128_256, n_heads=32, kv_heads=(8,) * 32,
    key_length=128, value_length=128, feed_forward=14_336, ctx_train=131_072, input_bytes=295_000_000, output_bytes=430_000_000,
    quantization="Q4_K_M",
)  # fmt: skip


def fit(shape: ModelShape = LLAMA_8B, n_devices: int = 1, **settings: Any) -> MemoryEstimate:
    chosen = replace(EngineSettings(ctx=8192), **settings)
    return estimate(shape, chosen, overhead_bytes_per_gpu=OVERHEAD, n_devices=n_devices)


def test_the_parts_of_an_eight_billion_model() -> None:
    found = fit()
    assert found.kv.size_bytes == GIB, "8192 tokens × 32 layers × 2 × 8 heads × 128 numbers × 2 bytes"
    assert found.weights.size_bytes == 4_920_000_000 - 295_000_000, "the token embedding stays in RAM"
    assert 100 * MIB < found.compute.size_bytes < 200 * MIB
    assert found.gpu_bytes == found.weights.size_bytes + found.kv.size_bytes + found.compute.size_bytes + OVERHEAD
    assert found.host.size_bytes > 295_000_000
    assert found.fixed_bytes_per_gpu == found.compute.size_bytes + OVERHEAD


def test_tied_embeddings_are_on_the_gpu_as_well() -> None:
    tied = replace(LLAMA_8B, tied_output=True, output_bytes=0)
    assert fit(tied).weights.size_bytes == tied.weights_bytes


def test_cache_types_and_slots_count_as_the_engine_counts_them() -> None:
    assert fit(cache_type_k="q8_0", cache_type_v="q8_0").kv.size_bytes == GIB * 34 // 64
    assert fit(ctx=1000, parallel=3).kv.size_bytes == 3 * 512 * GIB // 8192, "each slot is rounded up to 256 tokens"
    assert fit(ctx=1000, parallel=3, kv_unified=True).kv.size_bytes == 1024 * GIB // 8192
    assert fit(ctx=0).kv.size_bytes == 16 * GIB, "the model's own context"


def test_windowed_layers_hold_a_window_only() -> None:
    windowed = replace(LLAMA_8B, window=SlidingWindow(1024, (True, False) * 16))
    assert fit(windowed).kv.size_bytes == GIB // 2 + GIB // 2 * 1536 // 8192
    assert fit(windowed, swa_full=True).kv.size_bytes == GIB
    assert fit(replace(LLAMA_8B, window=SlidingWindow(1024))).kv.size_bytes == GIB, "which layers is unknown: none is spared"


def test_states_grow_with_slots_and_not_with_context() -> None:
    mamba = replace(LLAMA_8B, kv_heads=(0,) * 32, recurrent=Recurrent(10 * MIB))
    assert fit(mamba, parallel=4).kv.size_bytes == fit(mamba, parallel=4, ctx=100_000).kv.size_bytes == 40 * MIB


def test_what_is_unknown_is_guessed_generously_and_said_to_be() -> None:
    unknown = ModelShape("new", 4_920_000_000)
    found = fit(unknown)
    assert found.kv.size_bytes > GIB * 0.9
    assert found.kv.error_fraction == found.compute.error_fraction == 1.0
    assert found.error_bytes > found.kv.size_bytes
    assert estimate(ModelShape("x", 0), EngineSettings(), overhead_bytes_per_gpu=0).gpu_bytes > 0


def test_on_the_cpu_all_is_in_main_memory() -> None:
    for found in (fit(n_devices=0), fit(gpu_layers=0)):
        assert (found.gpu_bytes, found.per_device(()), found.overhead.size_bytes) == (0, (), 0)
        assert found.host.size_bytes > LLAMA_8B.weights_bytes + GIB


def test_layers_and_cache_left_in_main_memory_are_counted_there() -> None:
    half, whole = fit(gpu_layers=16), fit(gpu_layers=99)
    assert half.weights.size_bytes == whole.weights.size_bytes // 2
    assert half.host.size_bytes > whole.host.size_bytes + half.weights.size_bytes
    kept = fit(kv_on_gpu=False)
    assert kept.kv.size_bytes == 0
    assert kept.host.size_bytes == fit().host.size_bytes + GIB


def test_a_draft_model_and_files_beside_the_model_are_counted() -> None:
    draft = replace(LLAMA_8B, weights_bytes=500 * MIB, kv_heads=(8,) * 8, n_layers=8)
    found = fit(draft=draft, file_bytes=700 * MIB)
    assert found.weights.size_bytes == fit().weights.size_bytes + 1_200 * MIB
    assert found.kv.size_bytes == GIB + GIB // 4


def test_old_builds_keep_logits_of_a_whole_batch() -> None:
    assert fit(all_logits=True).compute.size_bytes == 512 * 128_256 * 4


def test_gpus_share_layers_as_the_engine_divides_them() -> None:
    two = fit(n_devices=2)
    shared = two.weights.size_bytes + GIB
    first, second = (part - two.fixed_bytes_per_gpu for part in two.per_device((0.8, 0.2)))
    each = (two.weights.size_bytes - LLAMA_8B.output_bytes) / 32 + GIB / 32
    assert second == pytest.approx(5 * each + LLAMA_8B.output_bytes, rel=1e-3), "six of 33 parts, the output being the last"
    assert second > shared * 0.2
    assert first == pytest.approx(shared * 0.8), "never below its ratio: what a plan was checked for"
    assert min(two.per_device((0.5, 0.5))) - two.fixed_bytes_per_gpu >= (two.weights.size_bytes + GIB) // 2
    assert fit(n_devices=2).compute.size_bytes > fit().compute.size_bytes, "inputs are copied for each GPU's turn"


def test_an_engine_that_takes_a_fraction_takes_it_whatever_it_needs() -> None:
    takes = DeviceFraction(0.9, ctx=8192)
    found = estimate(LLAMA_8B, takes, overhead_bytes_per_gpu=OVERHEAD, n_devices=2, device_bytes=(24 * GIB, 12 * GIB))
    assert found.per_device((0.5, 0.5)) == (int(24 * GIB * 0.9), int(12 * GIB * 0.9))
    assert found.kv.size_bytes == GIB, "one request must have room, not all of them"
    assert "the engine takes 21.6 GiB, 10.8 GiB whatever it needs of it" in found.explain()
    unknown = estimate(LLAMA_8B, takes, overhead_bytes_per_gpu=OVERHEAD)
    assert unknown.gpu_bytes == LLAMA_8B.weights_bytes + GIB + OVERHEAD, "before GPUs are chosen: the least that will do"
    assert estimate(LLAMA_8B, takes, overhead_bytes_per_gpu=OVERHEAD, n_devices=0).per_device(()) == ()


def test_a_measurement_replaces_the_estimate_and_its_spread_the_error() -> None:
    measured = Measurement((6 * GIB,), (7 * GIB,), 3, (GIB // 4,))
    found = fit().with_measurement(measured)
    assert found.per_device((1.0,)) == (7 * GIB + GIB // 4,)
    assert found.error_bytes == GIB // 4
    assert found.explain()[-2:] == (
        "measured before (3 loads): 6 GiB after loading, 7 GiB at the peak",
        "loads were up to 256 MiB apart, which is reserved on top of the peak",
    )
    assert found.with_measurement(None) == fit()
    assert fit(n_devices=2).with_measurement(measured).per_device((0.5, 0.5)) == fit(n_devices=2).per_device((0.5, 0.5))


def test_it_explains_itself() -> None:
    assert fit(parallel=4, cache_type_k="q8_0").explain() == (
        "weights (Q4_K_M): 4.31 GiB",
        "KV cache, 4 × 2048 tokens, q8_0/f16: 784 MiB",
        "compute buffers for 512 tokens at once: 110 MiB ± 25%",
        "overhead: 512 MiB",
        "RAM: 684 MiB ± 25%, up to 8 GiB more while it serves",
    )


def test_what_is_not_followed_is_said_and_makes_the_estimate_wider() -> None:
    unknown = fit(replace(LLAMA_8B, architecture="new", known=False))
    assert unknown.notes == ("the architecture 'new' is unknown here: its cache and state are a guess",)
    assert (unknown.weights.error_fraction, unknown.kv.error_fraction) == (0.02, 1.0)
    for found, note in (
        (fit(rules=(PlaceRule("x"),)), "which weights stay in RAM is not counted: the model has too many tensors to read each"),
        (fit(unmodelled=("--a", "--b")), "not counted: --a, --b, which changes what is needed"),
    ):
        assert found.notes == (note,) and found.explain()[-1] == note
        assert {part.error_fraction for part in (found.weights, found.kv, found.compute, found.host)} == {0.25}
        assert found.weights.size_bytes == fit().weights.size_bytes
    assert fit().notes == () and fit().weights.error_fraction == 0.02


def test_weights_that_rules_keep_in_ram_are_not_on_the_gpu() -> None:
    kept = replace(LLAMA_8B, tensors=(("blk.0.ffn_up_exps.weight", 100 * MIB), ("blk.31.ffn_up_exps.weight", 7 * MIB)))
    found, whole = fit(kept, rules=(PlaceRule("exps"),)), fit(kept)
    assert whole.weights.size_bytes - found.weights.size_bytes == 107 * MIB == found.host.size_bytes - whole.host.size_bytes
    assert {type(part) for part in whole.layer_bytes} == {int} and sum(whole.layer_bytes) < whole.weights.size_bytes + GIB
    saved = [a - b for a, b in zip(whole.layer_bytes, found.layer_bytes, strict=True)]
    assert saved == [100 * MIB, *[0] * 30, 7 * MIB]
    half = fit(kept, rules=(PlaceRule("exps"),), gpu_layers=16)
    assert fit(kept, gpu_layers=16).weights.size_bytes - half.weights.size_bytes == 107 * MIB // 2
    assert half.layer_bytes == ()


def test_an_encoder_keeps_no_cache() -> None:
    found = fit(replace(LLAMA_8B, encoder=True))
    assert str(found.kv) == "no KV cache: an encoder: 0" and found.kv.size_bytes == 0
    assert found.explain()[0].startswith("weights") and "KV cache" not in "".join(found.explain())


def test_a_draft_model_computes_and_caches_with_types_of_its_own() -> None:
    draft = replace(LLAMA_8B, kv_heads=(8,) * 8, n_layers=8, weights_bytes=500 * MIB, quantization=None)
    found = fit(draft=draft, draft_cache_type_k="q8_0", draft_cache_type_v="q8_0")
    assert found.kv.size_bytes == GIB + GIB // 4 * 34 // 64
    assert found.compute.size_bytes == 2 * fit().compute.size_bytes
    assert str(found.weights) == "weights (Q4_K_M) with a draft model: 4.8 GiB"


def test_the_cache_says_what_it_is_made_of() -> None:
    assert fit(kv_unified=True, parallel=4).kv.text == "KV cache, 8192 tokens for 4 slots, f16"
    mamba = replace(LLAMA_8B, kv_heads=(0,) * 32, recurrent=Recurrent(10 * MIB))
    copies = fit(mamba, state_copies=3, cache_type_v="q8_0")
    assert copies.kv.text == "KV cache, 1 × 8192 tokens, f16/q8_0, 3 states each" and copies.kv.size_bytes == 30 * MIB
    assert copies.kv.error_fraction == 0.02
    assert fit(replace(LLAMA_8B, window=SlidingWindow(1024))).kv.error_fraction == 0.25


shapes = st.builds(
    ModelShape,
    architecture=st.just("llama"),
    weights_bytes=st.integers(0, 100 * GIB),
    n_layers=st.just(4),
    n_embd=st.none() | st.integers(1, 16_384),
    n_vocab=st.none() | st.integers(1, 300_000),
    n_heads=st.none() | st.integers(1, 128),
    kv_heads=st.none() | st.tuples(*[st.integers(0, 64)] * 4),
    key_length=st.none() | st.integers(1, 1024),
    value_length=st.none() | st.integers(1, 1024),
    feed_forward=st.none() | st.integers(1, 65_536),
    ctx_train=st.none() | st.integers(1, 1 << 20),
    window=st.none() | st.builds(SlidingWindow, st.integers(1, 8192), st.none() | st.tuples(*[st.booleans()] * 4)),
    recurrent=st.none() | st.builds(Recurrent, st.integers(0, GIB)),
    latent_cache=st.booleans(),
)
engines = st.builds(
    EngineSettings,
    cache_type_k=st.sampled_from(["f16", "q8_0", "f32", "new"]),
    cache_type_v=st.sampled_from(["f16", "q4_0"]),
    ubatch=st.integers(1, 4096),
    flash_attn=st.booleans(),
    kv_unified=st.booleans(),
    all_logits=st.booleans(),
)


@given(
    shape=shapes, engine=engines, devices=st.integers(0, 3), ctx=st.integers(1, 1 << 20), more=st.integers(0, 1 << 18),
    parallel=st.integers(1, 64), slots=st.integers(0, 64),
)  # fmt: skip
def test_more_context_or_slots_never_need_less(
    shape: ModelShape, engine: EngineSettings, devices: int, ctx: int, more: int, parallel: int, slots: int
) -> None:
    def needs(total: int, number: int) -> tuple[int, ...]:
        found = estimate(shape, replace(engine, ctx=total, parallel=number), overhead_bytes_per_gpu=MIB, n_devices=devices)
        return (*found.per_device((1 / max(1, devices),) * devices), found.host.size_bytes)

    base = needs(ctx, parallel)
    assert all(size >= 0 for size in base)
    assert all(a >= b for a, b in zip(needs(ctx + more, parallel), base, strict=True))
    each = -(-ctx // (256 * parallel)) * 256
    assert all(
        a >= b for a, b in zip(needs(each * (parallel + slots), parallel + slots), needs(each * parallel, parallel), strict=True)
    ), "more slots of the same context"
