"""What one launch needs: as configured, as measured, or as estimated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pool_managerd.core.memory.estimate import DeviceFraction, EngineSettings, EstimatePart, MemoryEstimate
from pool_managerd.core.memory.estimator import LaunchEstimator, LaunchInputs
from pool_managerd.core.memory.measurements import Measurement, MeasurementKey, Measurements
from pool_managerd.core.memory.model_shape import ModelShape
from tests.core.gpus import GIB, gpu

SHAPE = ModelShape("llama", 4 * GIB, n_layers=2, n_embd=64, n_heads=2, kv_heads=(2, 2), key_length=32, value_length=32)
INPUTS = LaunchInputs("b1", "sha256:aa", EngineSettings(ctx=1024, parallel=2), SHAPE, 4 * GIB, GIB)


def launch(inputs: LaunchInputs = INPUTS, known: Measurements | None = None) -> LaunchEstimator:
    return LaunchEstimator(inputs, Measurements() if known is None else known)


def sizes(found: MemoryEstimate) -> tuple[int, ...]:
    return tuple(part.size_bytes for part in (found.weights, found.kv, found.compute, found.overhead, found.host))


def test_a_model_that_cannot_be_read_is_guessed_from_its_file() -> None:
    blind = replace(INPUTS, shape=None)
    one = launch(blind).estimate(1)
    assert (sizes(one), one.n_devices) == ((4 * GIB, 0, 0, GIB, 0), 1)
    assert str(one.weights) == "weights, from the size of the file alone: 4 GiB ± 50%"
    assert sizes(launch(blind).estimate(0)) == (0, 0, 0, 0, 4 * GIB)
    assert launch(replace(blind, weights_bytes=0)).estimate(1).weights.error_fraction == 0.0


def test_what_the_operator_says_is_for_all_gpus_together_and_says_nothing_of_the_cpu() -> None:
    own = replace(INPUTS, configured_bytes=6 * GIB)
    found = launch(own).estimate(2)
    assert (sizes(found), found.n_devices) == ((6 * GIB, 0, 0, 0, 0), 2) and str(found.weights) == "as configured: 6 GiB"
    assert launch(own).estimate(0) == launch().estimate(0)


def test_an_engine_that_offloads_nothing_opens_the_gpus_all_the_same() -> None:
    found = launch(replace(INPUTS, settings=EngineSettings(ctx=1024, gpu_layers=0))).estimate(2)
    assert (sizes(found)[:4], found.n_devices) == ((0, 0, 0, GIB), 2)
    assert found.host == launch(replace(INPUTS, settings=EngineSettings(ctx=1024, gpu_layers=0))).estimate(0).host


def test_a_measurement_is_of_a_kind_of_gpu_a_split_and_all_that_decides_memory() -> None:
    known = Measurements()
    two = launch(known=known)
    key = two.key((0.751, 0.249), "NVIDIA Test")
    assert (key.engine_version, key.ctx, key.parallel, key.split) == ("b1", 1024, 2, (0.75, 0.25))
    known.observe(key, [GIB, GIB], loaded=True)
    gpus = (gpu(0), gpu(1))
    assert two.estimate_on(gpus, (0.754, 0.246)).measured == Measurement((GIB, GIB), (GIB, GIB))
    for others in ((gpus, (0.5, 0.5)), ((gpu(0, name="another"), gpu(1)), (0.75, 0.25))):
        assert two.estimate_on(*others).measured is None
    assert two.estimate(2, (0.75, 0.25)).measured is None, "GPUs that are not chosen yet are of no kind"
    assert two.estimate(0).measured is None
    model, _, rest = key.model_digest.partition("+")
    assert model == "sha256:aa" and len(rest) == 12
    assert launch(replace(INPUTS, settings=EngineSettings())).key().model_digest == two.key().model_digest, "these are in the key"


def test_a_launch_that_takes_a_fraction_of_each_gpu_is_not_measured() -> None:
    takes = replace(INPUTS, settings=DeviceFraction(0.5, 1024))
    with pytest.raises(ValueError, match="is not measured"):
        launch(takes).key()
    found = launch(takes).estimate_on((gpu(0, 24), gpu(1, 12)))
    assert found.claimed_bytes == (12 * GIB, 6 * GIB) and found.overhead == EstimatePart("overhead", GIB)
    assert launch(replace(takes, configured_bytes=7 * GIB)).estimate_on((gpu(0), gpu(1))).claimed_bytes == (7 * GIB // 2,) * 2
    assert launch(replace(takes, configured_bytes=7 * GIB)).estimate(2).claimed_bytes == ()
    on_cpu = launch(takes).estimate(0)
    assert on_cpu.host == EstimatePart("RAM", 4 * GIB + 4 * GIB + on_cpu.kv.size_bytes, 0.25)
    assert (on_cpu.overhead.size_bytes, found.host) == (0, EstimatePart("RAM", 4 * GIB, 0.25))
    assert launch(takes).estimate_on((gpu(0),)).host == found.host
    assert str(found.weights) == "weights: 4 GiB" and found.weights.error_fraction == 0.02
    unread = launch(replace(takes, shape=None)).estimate(1)
    assert (unread.weights.size_bytes, unread.kv.size_bytes) == (4 * GIB, 0)
    assert found.kv.text == "KV cache, at least 1024 tokens" and found.kv.error_fraction == 0.25


def test_a_key_is_the_same_whatever_was_measured() -> None:
    assert isinstance(launch().key(), MeasurementKey) and launch().key() == launch(known=Measurements()).key((), "")
