"""What the llama.cpp adapter sets itself, and what it refuses to let a configuration set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.config import PoolConfig
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.engines.environment import device_env
from pool_managerd.engines.flags import OptionTable, raise_all
from pool_managerd.engines.llamacpp import rules
from pool_managerd.engines.llamacpp.command import Surroundings, build_env, build_flags, checked_flags, warmup_of
from pool_managerd.engines.llamacpp.options import ALIASES, parse_help, recorded_options
from pool_managerd.errors import SpecError
from tests.core.gpus import gpu

TABLE = recorded_options()
MakePool = Callable[..., PoolConfig]
DEV = Surroundings("dev", Path("/etc/pm"), gpu_present=False)
HOME = Surroundings("home", Path("/etc/pm"), gpu_present=True)


def pool_with(*flags: str, **keys: object) -> PoolConfig:
    return PoolConfig.model_validate({"id": "p", "engine": "llamacpp", "model": "m", "provisioning": {"flags": flags}, **keys})


def build(
    around: Surroundings, *flags: str, table: OptionTable = TABLE, model: str = "/m/x.gguf", **keys: object
) -> tuple[str, ...]:
    pool = pool_with(*flags, **keys)
    own, wrong = checked_flags(pool, model, table, around)
    raise_all(wrong)
    return build_flags(pool, own, model, 8080, table, around)


def refusal(around: Surroundings, *flags: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        build(around, *flags)
    return caught.value


def test_the_daemon_sets_model_address_slots_and_context() -> None:
    assert build(dataclasses.replace(DEV, tensor_split=(0.75, 0.25)), slots=4, ctx=2048) == (
        "--alias", "p", "--cors-origins", "localhost", "--ctx-size", "2048", "--host", "127.0.0.1", "--metrics",
        "--model", "/m/x.gguf", "--n-gpu-layers", "0", "--no-webui", "--offline", "--parallel", "4", "--port", "8080",
        "--tensor-split", "0.75,0.25",
    )  # fmt: skip


def test_gpu_only_profiles_place_every_layer_on_the_gpu() -> None:
    for profile in ("home", "cloud"):
        around = dataclasses.replace(HOME, profile=profile)
        for flags in ((), ("-ngl", "99"), ("--n-gpu-layers", "all")):
            built = build(around, *flags)
            assert built[built.index("--n-gpu-layers") + 1] == "999"


def test_profile_dev_leaves_layers_to_the_flags() -> None:
    assert "--n-gpu-layers" not in build(dataclasses.replace(DEV, gpu_present=True))
    built = build(DEV, "-ngl", "7")
    assert built[built.index("--n-gpu-layers") + 1] == "7"


@pytest.mark.parametrize(
    "flags",
    [
        ("--no-kv-offload",),
        ("-nkvo",),
        ("--cpu-moe",),
        ("-cmoe",),
        ("--n-cpu-moe", "3"),
        ("--no-mmproj-offload",),
        ("-ngl", "0"),
        ("-ngl", "20"),
        ("--n-gpu-layers", "auto"),
        ("--device", "none"),
        ("-dev", "NONE"),
        ("-ot", "blk.*=CPU"),
        ("--spec-draft-ngl", "0"),
        ("-cmoed",),
        ("-devd", "none"),
    ],
)
def test_work_on_the_cpu_is_refused_except_in_profile_dev(flags: tuple[str, ...]) -> None:
    for profile in ("home", "cloud"):
        error = refusal(dataclasses.replace(HOME, profile=profile), *flags)
        assert "GPU-only enforcement" in error.message
        assert error.code == "GPU_REQUIRED"
    assert build(DEV, *flags)


def test_flags_that_keep_work_on_the_gpu_are_no_offence() -> None:
    assert "--kv-offload" in build(HOME, "--kv-offload")
    assert "--device" in build(HOME, "--device", "CUDA0")


@pytest.mark.parametrize(
    "flags",
    [
        ("--device", "CUDA1"),
        ("-dev", "CUDA0,CUDA1"),
        ("-sm", "none"),
        ("-sm", "none", "-mg", "1"),
        ("--split-mode", "row"),
        ("--split_mode=tensor",),
        ("--main-gpu", "1"),
        ("-devd", "CUDA1"),
        ("-ot", "blk.1.*=CUDA1"),
        ("-ot", "exps=CPU,attn=CUDA0"),
    ],
)
@pytest.mark.parametrize("around", [DEV, HOME])
def test_gpus_are_chosen_by_devices_and_not_by_flags(around: Surroundings, flags: tuple[str, ...]) -> None:
    for keys in ({"devices": [0, 1]}, {"tensor_split": "auto"}):
        with pytest.raises(SpecError, match="the daemon chooses the GPUs") as caught:
            build(around, *flags, **keys)
        assert "use pools[].devices" in str(caught.value.hint)


def test_a_choice_among_one_gpu_is_no_offence() -> None:
    assert "--split-mode" in build(HOME, "-sm", "none", "-mg", "0", devices=[3])
    assert "--split-mode" in build(HOME, "-sm", "layer", devices=[0, 1])
    assert "--override-tensor" in build(HOME, "-ot", "a=CUDA0")
    with pytest.raises(SpecError, match="the daemon chooses"):
        build(HOME, "-ot", "a=CUDA1")
    with pytest.raises(SpecError, match="cannot use --device CUDA1"):
        build(HOME, "--device", "CUDA1")


def test_every_adapter_and_tensor_rule_of_a_list_is_kept(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "c.gguf"):
        (tmp_path / name).touch()
    model = str(tmp_path / "m.gguf")
    flags = (
        "--lora",
        str(tmp_path / "b.gguf"),
        "-ot",
        "a=CUDA0",
        "--lora",
        f"{tmp_path}/a.gguf,{tmp_path}/c.gguf",
        "-ot",
        "b=CUDA0",
    )
    built = build(HOME, *flags, model=model)
    start = built.index("--lora")
    assert built[start : start + 4] == (
        "--lora", str(tmp_path / "b.gguf"), "--lora", f"{tmp_path}/a.gguf,{tmp_path}/c.gguf",
    )  # fmt: skip
    assert [built[at + 1] for at, item in enumerate(built) if item == "--override-tensor"] == ["a=CUDA0", "b=CUDA0"]
    with pytest.raises(SpecError, match="keeps tensors in RAM"):
        build(HOME, "-ot", "a=CUDA0", "-ot", "exps=CPU")
    with pytest.raises(SpecError, match="lies outside"):
        build(HOME, "--lora", str(tmp_path / "a.gguf"), "--lora", "/etc/passwd", model=model)


@pytest.mark.parametrize(
    "flag", ["--api_key", "--api_key_file", "--api_key=x", "--port=9", "--ctx_size=4", "--model_url=x", "--hf_repo"]
)
def test_underscores_do_not_pass_by_the_rules(flag: str) -> None:
    error = refusal(DEV, flag, *(() if "=" in flag else ("x",)))
    assert "cannot allow" in error.message or "the daemon sets it" in error.message


def test_long_flags_may_be_written_with_underscores() -> None:
    assert build(DEV, "--top_p", "0.5", "--cache_type_k=q8_0", "--no_kv_offload") == build(
        DEV, "--top-p", "0.5", "--cache-type-k", "q8_0", "--no-kv-offload"
    )


ENCODER = dataclasses.replace(HOME, encoder=True, task="embed")
RANKER = dataclasses.replace(HOME, encoder=True, task="rerank")
POOLED = dataclasses.replace(HOME, task="embed")


@pytest.mark.parametrize(
    ("around", "flags", "added", "warmup"),
    [
        (HOME, (), None, "completion"),
        (ENCODER, (), "--embeddings", "embedding"),
        (ENCODER, ("--embeddings",), None, "embedding"),
        (ENCODER, ("--pooling", "none"), "--embeddings", "none"),
        (RANKER, (), "--reranking", "rerank"),
        (RANKER, ("--embedding",), None, "rerank"),
        (ENCODER, ("--reranking",), None, "rerank"),
        (POOLED, (), None, "completion"),
        (POOLED, ("--embedding",), None, "embedding"),
        (HOME, ("--embedding",), None, "none"),
        (HOME, ("--embedding", "--pooling", "mean"), None, "embedding"),
    ],
)
def test_an_encoder_is_served_as_one_and_the_first_request_is_one_that_it_answers(
    around: Surroundings, flags: tuple[str, ...], added: str | None, warmup: str
) -> None:
    built = build(around, *flags)
    assert warmup_of(built, TABLE, around) == warmup
    assert [flag for flag in built if "embedding" in flag or "rerank" in flag] == ([added] if added else [
        flag if flag != "--embedding" else "--embeddings" for flag in flags if "embedding" in flag or "rerank" in flag
    ])  # fmt: skip


@pytest.mark.parametrize("flag", [*rules.OWNED, "-m", "-np", "-c", "-ts"])
def test_a_flag_the_daemon_sets_names_the_key_to_use(flag: str) -> None:
    error = refusal(DEV, flag, "7")
    assert "the daemon sets it" in error.message
    assert error.hint is not None
    assert error.hint.startswith("use ")


@pytest.mark.parametrize("flag", sorted(rules.REFUSED))
def test_every_flag_that_widens_the_engines_reach_is_refused_with_a_reason(flag: str) -> None:
    values = ["x"] * TABLE.use(flag).option.values
    assert refusal(DEV, flag, *values).message.startswith("cannot allow the flag")


def test_presets_that_download_are_refused() -> None:
    assert "download" in refusal(DEV, "--gpt-oss-20b-default").message
    assert "download" in refusal(DEV, "--fim-qwen-7b-spec").message
    assert "--spec-default" in build(DEV, "--spec-default")


def test_every_rule_speaks_of_an_option_of_the_real_server() -> None:
    named = [*rules.OWNED, *rules.REFUSED, *rules.FILES, *rules.ON_CPU, *rules.DEVICES, *rules.TENSOR_PLACES, *rules.LAYERS]
    assert [name for name in named if name not in TABLE] == []


def test_no_option_that_names_a_path_or_a_url_slips_through() -> None:
    suspicious = [
        option
        for option in TABLE.options
        if any(part in name for name in option.names for part in ("file", "path", "-dir", "url", "repo", "key", "token", "cert"))
        and option.values
    ]
    harmless = {"--image-min-tokens", "--image-max-tokens", "--mtmd-batch-max-tokens"}
    for option in suspicious:
        if option.canonical in harmless or any(name in rules.FILES for name in option.names):
            continue
        assert "cannot allow" in refusal(DEV, option.canonical, "x").message, option


def test_a_file_beside_the_model_is_allowed_and_made_absolute(tmp_path: Path) -> None:
    for name in ("m.gguf", "a.gguf", "b.gguf", "t.jinja"):
        (tmp_path / name).touch()
    around = Surroundings("dev", tmp_path, gpu_present=False)
    model = str(tmp_path / "m.gguf")
    built = build(around, "--lora", "a.gguf,b.gguf", "--chat-template-file", "t.jinja", model=model)
    assert built[built.index("--lora") + 1] == f"{tmp_path}/a.gguf,{tmp_path}/b.gguf"
    assert built[built.index("--chat-template-file") + 1] == f"{tmp_path}/t.jinja"


def test_a_file_elsewhere_is_refused_links_included(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "m.gguf").touch()
    (inside / "link.gguf").symlink_to("/etc/passwd")
    around = Surroundings("dev", inside, gpu_present=False)
    for path in ("/etc/passwd", "../x.gguf", "link.gguf", "m.gguf,/etc/passwd"):
        with pytest.raises(SpecError, match="lies outside"):
            build(around, "--lora", path, model=str(inside / "m.gguf"))
    with pytest.raises(SpecError, match="there is no file"):
        build(around, "--mmproj", "none.gguf", model=str(inside / "m.gguf"))


def test_an_older_server_gets_no_flag_that_it_does_not_know() -> None:
    older = parse_help(
        "-m,    --model FNAME                    model\n--host HOST                             h\n"
        "--port PORT                             p\n-np,   --parallel N                     n\n"
        "-c,    --ctx-size N                     c\n-ngl,  --gpu-layers, --n-gpu-layers N   g\n"
        "--no-webui                              Disable the Web UI\n"
    )
    built = build(HOME, table=OptionTable(older, ALIASES))
    assert "--cors-origins" not in built
    assert "--offline" not in built
    assert "--no-webui" in built


def test_the_environment_shows_the_chosen_gpus_in_the_order_of_the_bus(make_pool: MakePool) -> None:
    assert build_env(make_pool(provisioning={"env": {"OMP_NUM_THREADS": "2"}}), "home") == {"OMP_NUM_THREADS": "2"}
    masked, order = make_pool(devices=(1, 0)), {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert device_env(masked, None) == {**order, "CUDA_VISIBLE_DEVICES": "1,0"}
    assigned = Allocation((gpu(1), gpu(0)), {})
    assert device_env(masked, assigned) == {**order, "CUDA_VISIBLE_DEVICES": "GPU-00000000,GPU-00000001"}
    assert device_env(make_pool(), None) == {}


@pytest.mark.parametrize(
    ("name", "profile", "message"),
    [
        ("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "home", "GPU-only enforcement"),
        ("CUDA_VISIBLE_DEVICES", "dev", "the daemon sets it"),
        ("LLAMA_ARG_TOOLS", "dev", "llama.cpp takes flags from it"),
        ("LLAMA_API_KEY", "dev", "llama.cpp takes flags from it"),
        ("A=B", "dev", "no variable name"),
        ("", "dev", "no variable name"),
    ],
)
def test_a_variable_that_passes_by_the_rules_is_refused(
    make_pool: MakePool, name: str, profile: Literal["home", "dev"], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        build_env(make_pool(provisioning={"env": {name: "1"}}), profile)


def test_unified_memory_is_a_choice_in_profile_dev(make_pool: MakePool) -> None:
    pool = make_pool(provisioning={"env": {"GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1"}})
    assert build_env(pool, "dev") == {"GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1"}


_harmless = ["--threads", "--batch-size", "--seed", "--cache-reuse", "--top-k", "--keep"]


@given(st.dictionaries(st.sampled_from(_harmless), st.integers(0, 99)), st.integers(1, 64), st.none() | st.integers(1, 10**6))
def test_the_built_flags_are_their_own_normal_form_and_hold_the_pools_numbers(
    chosen: dict[str, int], slots: int, ctx: int | None
) -> None:
    flags = [item for name, value in chosen.items() for item in (name, str(value))]
    built = build(HOME, *flags, slots=slots, ctx=ctx)
    assert TABLE.parse(built) == tuple(sorted(TABLE.parse(built), key=lambda use: use.name))
    found = {use.name: use.values for use in TABLE.parse(built)}
    assert found["--parallel"] == (str(slots),)
    assert found.get("--ctx-size") == (None if ctx is None else (str(ctx),))
    assert all(found[name] == (str(value),) for name, value in chosen.items())
