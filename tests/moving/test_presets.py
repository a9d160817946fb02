"""Each key of llama.cpp's presets: what it is here, or why it is not."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool_managerd.errors import SpecError
from pool_managerd.moving import presets
from pool_managerd.moving.draft import Surroundings
from tests.moving.moved import SURROUNDINGS, move_presets

WHOLE = """\
version = 1

; what all of them have
[*]
c = 8192
ngl = 99
flash-attn = on
stop-timeout = 20

[coder]                  ; a draft model beside it
model = /models/coder.gguf
model-draft = /models/draft.gguf
LLAMA_ARG_CTX_SIZE = 65536
parallel = 2
alias = gpt-4o-mini, code
load-on-startup = true

[ggml-org/gemma-3-4b-it-GGUF:Q4_K_M]
hf-repo = ggml-org/gemma-3-4b-it-GGUF:Q4_K_M
tags = vision,small
sleep-idle-seconds = 600

[embed]
model = /models/embed.gguf
embeddings = true
no-mmap = true
"""


def test_a_whole_file_is_pleasant_to_read() -> None:
    moved = move_presets(WHOLE)
    assert moved.dropped() == ["[ggml-org/gemma-3-4b-it-GGUF:Q4_K_M] hf-repo"]
    assert (
        moved.text
        == """\
# From presets.ini by `pool-managerd import llama-cpp-presets`.
# Not in that file, and so not here: flags on the router's own command line, which win over those of the file,
#   and models that it finds in its cache or in --models-dir.
profile: home
gateway:
  # the router listens on 127.0.0.1:8080, unless --host or --port says otherwise; off loopback keys are required
  bind: "127.0.0.1:8088"
supervision: {stop_grace_ms: 20000}
pools:
  - id: coder
    engine: llamacpp
    model: "file:/models/coder.gguf"
    ctx: 65536
    slots: 2
    preload: true
    aliases: [gpt-4o-mini, code]
    provisioning:
      mode: binary
      binary: {path: /usr/bin/llama-server}
      flags: [--flash-attn, "on", --spec-draft-model, /models/draft.gguf]
  # dropped: hf-repo: allow it in `policy` and write `model: hf:ORG/REPO:QUANTISATION`, or name a file of yours
  #   (gemma-3-4b-it-GGUF-Q4_K_M.gguf)
  - id: ggml-org-gemma-3-4b-it-GGUF-Q4_K_M
    engine: llamacpp
    model: "file:models/gemma-3-4b-it-GGUF-Q4_K_M.gguf"
    ctx: 8192
    preload: false
    served_name: "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M"
    card:
      metadata: {tags: [vision, small]}
    idle_ttl_ms: 600000
    provisioning:
      mode: binary
      binary: {path: /usr/bin/llama-server}
      flags: [--flash-attn, "on"]
  - id: embed
    engine: llamacpp
    model: "file:/models/embed.gguf"
    ctx: 8192
    preload: false
    provisioning:
      mode: binary
      binary: {path: /usr/bin/llama-server}
      flags: [--flash-attn, "on", --embeddings, --no-mmap]
"""
    )


ROUTER = "needless the router takes it from its own command line alone"
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("c = 4096", {"ctx": 4096}, "mapped pools[].ctx"),
    ("ctx_size = 4096", {"ctx": 4096}, "mapped pools[].ctx"),
    ("LLAMA_ARG_CTX_SIZE = 4096", {"ctx": 4096}, "mapped pools[].ctx"),
    ("ctx-size = 0", {}, "needless without it the context is the model's own, too"),
    ("LLAMA_ARG_N_PARALLEL = 3", {"slots": 3}, "mapped pools[].slots"),
    ("np = 1", {}, "mapped pools[].slots"),
    ("tensor-split = 3,1", {"devices": [0, 1], "tensor_split": [3, 1]},
     "mapped pools[].tensor_split: one share for each of `devices`"),
    ("device = CUDA1", {"devices": [1]}, "mapped pools[].devices: indices are in PCI order here"),
    ("n-gpu-layers = 99", {}, "needless all layers are on the GPU"),
    ("temp = 0.7 # warm", {"provisioning": {"flags": ["--temperature", "0.7"]}}, "kept pools[].provisioning.flags"),
    ("seed = -1", {"provisioning": {"flags": ["--seed", "-1"]}}, "kept pools[].provisioning.flags"),
    ("chat-template = -c", {"provisioning": {"flags": ["--chat-template=-c"]}}, "kept pools[].provisioning.flags"),
    ("flash-attn = true", {"provisioning": {"flags": ["--flash-attn", "true"]}}, "kept pools[].provisioning.flags"),
    ("no-mmap = true", {"provisioning": {"flags": ["--no-mmap"]}}, "kept pools[].provisioning.flags"),
    ("no-mmap = off", {"provisioning": {"flags": ["--mmap"]}}, "kept pools[].provisioning.flags"),
    ("mmap = 0", {"provisioning": {"flags": ["--no-mmap"]}}, "kept pools[].provisioning.flags"),
    ("embeddings = false", {}, "needless it is so without it"),
    ("LLAMA_ARG_NO_MMAP = true", {}, "dropped the router takes it for its opposite: write no-mmap = true, if you mean that"),
    ("LLAMA_ARG_NO_HOST = true", {"provisioning": {"flags": ["--no-host"]}}, "kept pools[].provisioning.flags"),
    ("control-vector-layer-range = 1 2", {},
     "dropped the router does not take flags of two values: write it into provisioning.flags"),
    ("grammar =", {}, "dropped it has no value: write one, or take it out"),
    ("new-flag = 7", {"provisioning": {"flags": ["--new-flag", "7"]}},
     "kept pools[].provisioning.flags: checked against what the engine lists when it starts"),
    ("new-flag = on", {}, "dropped it is not known here, nor whether it takes a value: write its flag into provisioning.flags"),
    ("some-api-key = sk-123456789", {}, "dropped it looks like a secret, and none is copied"),
    ("hf-token = hf_123456789", {}, "dropped it looks like a secret, and none is copied"),
    ("HF_TOKEN = hf_123456789", {}, "dropped it looks like a secret, and none is copied"),
    ("api-key = sk-123456789", {}, f"{ROUTER}, and keys are the gateway's: `pool-managerd keys add NAME` makes one"),
    ("LLAMA_API_KEY = sk-123456789", {}, f"{ROUTER}, and keys are the gateway's: `pool-managerd keys add NAME` makes one"),
    ("ssl-key-file = /k", {}, f"{ROUTER}; here it is gateway.tls_key"),
    ("models-max = 2", {}, f"{ROUTER}; here memory decides how many are loaded"),
    ("models-dir = /models", {}, ROUTER),
    ("no-models-autoload = true", {}, f"{ROUTER}; see `preload`"),
    ("host = 0.0.0.0", {}, "needless the router sets it itself, as the daemon does"),
    ("port = 8081", {}, "needless the router sets it itself, as the daemon does"),
    ("alias = one, two,one", {"aliases": ["one", "two"]}, "mapped pools[].aliases"),
    ("alias = m", {}, "mapped pools[].aliases"),
    ("alias = \x07, b", {"aliases": ["b"]}, "dropped a name has 1 to 256 printable characters here: '\\x07' has not"),
    ("tags = a, b", {"card": {"metadata": {"tags": ["a", "b"]}}}, "kept pools[].card.metadata.tags"),
    ("tags =", {}, "needless it says nothing"),
    ("sleep-idle-seconds = 90", {"idle_ttl_ms": 90_000},
     "mapped pools[].idle_ttl_ms: the engine ends, and starts when it is asked again"),
    ("sleep-idle-seconds = -1", {}, "needless never is the default here, too"),
    ("sleep-idle-seconds = soon", {}, "dropped it is no number of seconds: set `idle_ttl_ms` of the pool"),
    ("stop-timeout = soon", {}, "needless it is no number of seconds: the router goes by 10"),
    ("dedup-cache-models = true", {}, "needless there is no cache of models here"),
    ("rpc = host:50052", {}, "dropped it sends the model's work to other machines"),
    ("slot-save-path = /x", {}, "needless see slot_cache"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "pool", "became"), ROWS, ids=[row[0] for row in ROWS])
@pytest.mark.parametrize("section", ["m", "*"])
def test_a_key(section: str, line: str, pool: dict[str, Any], became: str) -> None:
    beside = f"[{section}]\n{line}\n"
    moved = move_presets(f"[m]\nmodel = /m/a.gguf\n{line}\n" if section == "m" else f"{beside}[m]\nmodel = /m/a.gguf\n")
    assert moved.pool == pool
    assert moved.of(f"[{section}] {line.split(' ', maxsplit=1)[0]}") == [became]
    assert "123456789" not in moved.text + str(moved.findings)


def test_a_models_own_key_wins_over_the_global_one_however_it_is_called() -> None:
    moved = move_presets("[*]\nc = 1\nno-mmap = 1\nalias = x\n[a]\nmodel = /a\nLLAMA_ARG_CTX_SIZE = 2\nmmap = 1\nalias =\n")
    assert moved.pool == {"ctx": 2, "provisioning": {"flags": ["--mmap"]}}
    assert moved.of("[*] c") == moved.of("[*] no-mmap") == moved.of("[*] alias") == ["needless each model has its own"]


def test_of_two_names_for_one_option_the_one_counts_that_the_router_takes() -> None:
    moved = move_presets("[a]\nmodel = /a\nctx-size = 64\nc = 128\nLLAMA_ARG_CTX_SIZE = 256\nseed = 1\nseed = 2\n")
    assert moved.pool == {"ctx": 64, "provisioning": {"flags": ["--seed", "2"]}}
    assert moved.of("[a] c") == ["needless line 3 sets the same, and counts"]
    assert moved.of("[a] seed") == ["needless line 7 sets the same, and counts", "kept pools[].provisioning.flags"]


def test_a_global_key_that_fares_otherwise_with_one_model_is_told_for_each() -> None:
    moved = move_presets("[*]\nmodel-draft = /m/d.gguf\n[a]\nmodel = /m/a.gguf\n[b]\nmodel = /n/b.gguf\n")
    assert len(moved.of("[*] model-draft (a)")) == len(moved.of("[*] model-draft (b)")) == 1
    assert "must lie beside the model" in moved.of("[*] model-draft (b)")[0]


def test_a_model_that_only_the_router_finds_is_dropped_with_what_to_do() -> None:
    moved = move_presets("[org/repo:Q4]\nc = 64\n")
    assert moved.dropped() == ["[org/repo:Q4] (no model)"]
    assert (
        moved.config.pools[0].model == "file:models/org-repo-Q4.gguf" and "# dropped: (no model): it names no model" in moved.text
    )


def test_a_section_is_asked_by_its_name_whatever_the_pool_is_called() -> None:
    moved = move_presets("[org/one]\nmodel = /a\n[a,b]\nmodel = /b\n[x\x07]\nmodel = /c\n[org-one]\nmodel = /d\n")
    assert [pool.id for pool in moved.config.pools] == ["org-one-2", "a-b", "x", "org-one"]
    assert [(pool.served_name, pool.aliases) for pool in moved.config.pools] == [
        ("org/one", ()), (None, ("a,b",)), (None, ()), (None, ()),
    ]  # fmt: skip
    assert moved.dropped() == ["[x�] (name)"]


def test_the_longest_time_to_end_is_that_of_all() -> None:
    assert "stop_grace_ms" not in move_presets("[a]\nmodel = /a\n").text
    assert "stop_grace_ms: 10000" in move_presets("[a]\nmodel = /a\nstop-timeout = 3\n[b]\nmodel = /b\n").text
    assert "stop_grace_ms: 3000" in move_presets("[*]\nstop-timeout = 3\n[b]\nmodel = /b\n").text


def test_a_llama_server_that_is_not_in_path_is_told() -> None:
    around = Surroundings(lambda _: None, SURROUNDINGS.flags, SURROUNDINGS.keyed)
    moved = presets.convert("[a]\nmodel = /a\n", "presets.ini", around)
    assert moved.dropped == 1 and "dropped: llama-server: it is not in the PATH" in moved.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]\nalias = b\n[b]\nc = 1", "presets.ini:2:1: [a] alias: cannot use the name 'b' for 'a': 'b' has it"),
        ("[a]\nalias = x\n[b]\nalias = x", "presets.ini:4:1: [b] alias: cannot use the name 'x' for 'b': 'a' has it"),
        ("[*]\nalias = x\n[a]\n[b]", "cannot use the name 'x' for 'b': 'a' has it"),
        ("[*]\nc = 1", "presets.ini: cannot find any models in it"),
    ],
)
def test_what_the_router_would_not_start_with_is_refused(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        move_presets(text)
    assert said in caught.value.message and caught.value.code == "CONFIG_ERROR" and caught.value.hint


def test_a_thousand_models_of_nothing_but_unknown_keys_end_soon() -> None:
    text = "[*]\n" + "".join(f"zz{i} = {i}\n" for i in range(40)) + "".join(f"[m{i}]\nmodel = /m\n" for i in range(900))
    began = time.monotonic()
    with pytest.raises(SpecError, match="beyond"):
        move_presets(text)
    assert time.monotonic() - began < 40


Entries = list[tuple[str, str]]
keys = st.sampled_from([
    "model", "c", "np", "ts", "dev", "sm", "mg", "alias", "tags", "ngl", "hf-repo", "no-mmap", "mmap", "LLAMA_ARG_MMPROJ",
    "load-on-startup", "stop-timeout", "sleep-idle-seconds", "api-key", "chat-template", "lora", "ot", "version2", "zz",
]) | st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True).filter(lambda key: key != "version")  # fmt: skip
values = st.text(max_size=12) | st.sampled_from(
    ["/m/a.gguf", "1", "-1", "0", "true", "off", "1,0", "CUDA1", "none", "-c", "--host"]
)
sections = st.lists(st.tuples(keys, values), max_size=6)
names = st.text(min_size=1, max_size=8) | st.sampled_from(["a", "b", "org/repo:Q4", "models"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, sections, min_size=1, max_size=3), sections)
def test_whatever_is_moved_loads_or_is_refused_with_a_reason(
    found: dict[str, list[tuple[str, str]]], whole: list[tuple[str, str]]
) -> None:
    text = "version = 1\n"
    for name, entries in {"*": whole, **found}.items():
        text += f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in entries)
    try:
        move_presets(text)
    except SpecError as error:
        assert error.code == "CONFIG_ERROR" and "cannot" in error.message
