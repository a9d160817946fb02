"""Each key of a llama-swap file: what it is here, or why it is not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool_managerd.errors import SpecError
from tests.moving.moved import model, move

WHOLE = """
# two models that take turns, a small one that stays, one in a container
healthCheckTimeout: 300
globalTTL: 900
startPort: 9600
macros:
  server: llama-server --port ${PORT} --flash-attn on
  models: "${env.HOME}/models"
models:
  coder/30b:
    macros: {ctx: 32768}
    cmd: |
      # the large one
      ${server} \\
      -m ${models}/coder.gguf -c ${ctx} -np 2 -ngl 99
    aliases: [coder, "${MODEL_ID}-latest"]
    ttl: 0
  chat:
    cmd: ${server} -m ${models}/chat.gguf
    filters:
      stripParams: "temperature, top_k"
      setParamsByID:
        "${MODEL_ID}:think": {chat_template_kwargs: {enable_thinking: true}}
  embed:
    cmd: ${server} -m ${models}/embed.gguf --embeddings
  speech:
    cmd: docker run --rm --name ${MODEL_ID} -p ${PORT}:8000 speech:latest
    cmdStop: docker stop ${MODEL_ID}
groups:
  small: {swap: false, exclusive: false, persistent: true, members: [embed]}
hooks: {on_startup: {preload: [embed]}}
"""


def test_a_whole_file_is_pleasant_to_read() -> None:
    moved = move(WHOLE, {"HOME": "/home/ada"})
    assert moved.dropped() == ["models.speech.cmd", "models.speech.cmdStop"]
    assert (
        moved.text
        == """\
# From swap.yaml by `pool-managerd import llama-swap`.
profile: home
daemon: {engine_ports: "9600-10599"}
gateway:
  # llama-swap listens on :8080 of every address, unless -listen says otherwise; off loopback keys are required
  bind: "127.0.0.1:8088"
health: {startup_timeout_ms: 300000}
lifecycle: {idle_ttl_ms: 900000}
pools:
  - id: coder-30b
    engine: llamacpp
    model: "file:/home/ada/models/coder.gguf"
    ctx: 32768
    slots: 2
    preload: false
    # aliases: ${MODEL_ID}-latest
    aliases: [coder/30b, coder, coder/30b-latest]
    idle_ttl_ms: 0
    # cmd: # the large one
    # ${server} \\
    # -m ${models}/coder.gguf -c ${ctx} -np 2 -ngl 99
    provisioning:
      mode: binary
      binary: {path: /usr/bin/llama-server}
      flags: [--flash-attn, "on"]
  - id: chat
    engine: llamacpp
    model: "file:/home/ada/models/chat.gguf"
    preload: false
    # filters: ${MODEL_ID}:think
    requests:
      strip: [temperature, top_k]
      by_name:
        "chat:think":
          chat_template_kwargs: {enable_thinking: true}
    # cmd: ${server} -m ${models}/chat.gguf
    provisioning:
      mode: binary
      binary: {path: /usr/bin/llama-server}
      flags: [--flash-attn, "on"]
  - id: embed
    engine: llamacpp
    model: "file:/home/ada/models/embed.gguf"
    preload: true
    # cmd: ${server} -m ${models}/embed.gguf --embeddings
    provisioning:
      mode: binary
      binary: {path: /usr/bin/llama-server}
      flags: [--flash-attn, "on", --embeddings]
  # dropped: cmd: containers are not started yet: start it yourself (a service of the system); here it is
  #   attached to
  # dropped: cmdStop: whoever starts the program stops it
  - id: speech
    engine: llamacpp
    model: speech
    slots: 10
    # start it yourself, as: docker run --rm --name speech -p 9603:8000 speech:latest
    provisioning: {mode: external, url: "http://localhost:9603"}
together:
  groups:
    - {id: small, pools: [embed], swap: false, persistent: true}
    # llama-swap keeps one of these loaded at a time. Here memory decides who makes room: without this group,
    #   models stay loaded together where they fit.
    - {id: default, pools: [coder-30b, chat], exclusive: true}
"""
    )


ROWS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"aliases": ["x", "a"]}, {"aliases": ["x"]}, "models.a.aliases", "mapped pools[].aliases"),
    ({"ttl": 60}, {"idle_ttl_ms": 60_000}, "models.a.ttl", "mapped pools[].idle_ttl_ms"),
    ({"ttl": 10**9}, {"idle_ttl_ms": 30 * 86_400_000}, "models.a.ttl", "mapped pools[].idle_ttl_ms: 30 days are the most"),
    ({"ttl": -1}, {}, "models.a.ttl", "needless it is what globalTTL says"),
    ({"ttl": 0}, {}, "models.a.ttl", "needless it is what globalTTL says"),
    ({"unloadTimeout": 30}, {}, "models.a.unloadTimeout", "mapped supervision.stop_grace_ms: one for all pools: the longest"),
    ({"checkEndpoint": "/v2/ready"}, {"health_path": "/v2/ready"}, "models.a.checkEndpoint", "mapped pools[].health_path"),
    (
        {"checkEndpoint": "none"},
        {},
        "models.a.checkEndpoint",
        "needless ready without a probe would be a guess: /health is asked here",
    ),
    ({"checkEndpoint": "/health"}, {}, "models.a.checkEndpoint", "needless /health is asked here, too"),
    ({"env": ["A=b=c"]}, {"provisioning": {"env": {"A": "b=c"}}}, "models.a.env A", "kept pools[].provisioning.env.A"),
    (
        {"env": ["CUDA_VISIBLE_DEVICES=1"]},
        {"devices": [1]},
        "models.a.env CUDA_VISIBLE_DEVICES",
        "mapped pools[].devices: indices are in PCI order here",
    ),
    (
        {"env": ["CUDA_VISIBLE_DEVICES=GPU-0a"]},
        {"devices": ["GPU-0a"]},
        "models.a.env CUDA_VISIBLE_DEVICES",
        "mapped pools[].devices: indices are in PCI order here",
    ),
    (
        {"env": ["CUDA_VISIBLE_DEVICES="]},
        {},
        "models.a.env CUDA_VISIBLE_DEVICES",
        "dropped it shows the engine no GPU: with `profile: dev` engines may run on the CPU",
    ),
    (
        {"env": ["CUDA_VISIBLE_DEVICES=0,0"]},
        {},
        "models.a.env CUDA_VISIBLE_DEVICES",
        "dropped cannot use the device mask '0,0': it names 0 twice",
    ),
    ({"env": ["CUDA_DEVICE_ORDER=PCI_BUS_ID"]}, {}, "models.a.env CUDA_DEVICE_ORDER", "needless GPUs are always counted so"),
    (
        {"env": ["LLAMA_ARG_CTX_SIZE=1"]},
        {},
        "models.a.env LLAMA_ARG_CTX_SIZE",
        "dropped write it as a flag into provisioning.flags, or as a key of the pool",
    ),
    ({"env": ["nonsense"]}, {}, "models.a.env 'nonsense'", "dropped it is not NAME=VALUE"),
    ({"env": []}, {}, "models.a.env", "needless it is empty"),
    ({"useModelName": "other"}, {}, "models.a.useModelName", "needless llama-server answers under any name"),
    (
        {"filters": {"stripParams": "a, model,,b"}},
        {"requests": {"strip": ["a", "b"]}},
        "models.a.filters.stripParams",
        "mapped pools[].requests.strip",
    ),
    (
        {"filters": {"strip_params": "a"}},
        {"requests": {"strip": ["a"]}},
        "models.a.filters.strip_params",
        "mapped pools[].requests.strip",
    ),
    (
        {"filters": {"setParams": {"a.b": [1, None], "model": "m"}}},
        {"requests": {"set": {"a.b": [1, None]}}},
        "models.a.filters.setParams",
        "mapped pools[].requests.set",
    ),
    (
        {"filters": {"setParams": {"model": "m"}}},
        {},
        "models.a.filters.setParams.model",
        "needless llama-swap never sets `model` either",
    ),
    (
        {"filters": {"setParams": {"a.0": 1}}},
        {},
        "models.a.filters.setParams.a.0",
        "dropped a dot reaches into an object here, and nothing into a list: set the whole list",
    ),
    (
        {"filters": {"setParamsByID": {"a": {"t": 1}, "hot": {}}}},
        {"requests": {"by_name": {"a": {"t": 1}, "hot": {}}}},
        "models.a.filters.setParamsByID.a",
        "mapped pools[].requests.by_name",
    ),
    ({"filters": {}}, {}, "models.a.filters", "needless it is empty"),
    (
        {"concurrencyLimit": 3},
        {"slots": 3, "provisioning": {"flags": ["--kv-unified"]}},
        "models.a.concurrencyLimit",
        "mapped pools[].slots: with --kv-unified each may use the whole context",
    ),
    ({"concurrencyLimit": 0}, {}, "models.a.concurrencyLimit", "needless it is the usual"),
    (
        {"cmd": "llama-server -m m.gguf -np 2", "concurrencyLimit": 8, "filters": {"stripParams": "top_k"}},
        {"slots": 2, "requests": {"concurrency": 8, "strip": ["top_k"]}},
        "models.a.concurrencyLimit",
        "mapped pools[].requests.concurrency: those that wait for a slot are counted, too",
    ),
    (
        {"cmd": "llama-server -m m.gguf -np 2", "concurrencyLimit": 2},
        {"slots": 2},
        "models.a.concurrencyLimit",
        "needless as many requests go in as there are slots; others wait, instead of being refused",
    ),
    (
        {"cmdStop": "kill -TERM ${PID}"},
        {},
        "models.a.cmdStop",
        "needless a stop ends the engine and all it started, with SIGTERM and then SIGKILL",
    ),
    (
        {"cmdStop": "rm -rf cache"},
        {},
        "models.a.cmdStop",
        "dropped nothing runs at a stop but SIGTERM and SIGKILL: clean up elsewhere",
    ),
    ({"proxy": "http://127.0.0.1:8999"}, {}, "models.a.proxy", "needless the daemon gives the engine its port"),
    (
        {"proxy": "http://10.0.0.7:1"},
        {},
        "models.a.proxy",
        "dropped engines are started on this machine and asked at /: for another one, write an external pool",
    ),
    ({"name": "A"}, {"card": {"name": "A"}}, "models.a.name", "mapped pools[].card.name"),
    ({"description": ""}, {}, "models.a.description", "needless it says nothing"),
    (
        {"metadata": {"x": 1}},
        {"card": {"metadata": {"x": 1}}},
        "models.a.metadata",
        "mapped pools[].card.metadata",
    ),
    (
        {"capabilities": {"in": ["text"]}},
        {"card": {"metadata": {"capabilities": {"in": ["text"]}}}},
        "models.a.capabilities",
        "kept pools[].card.metadata.capabilities",
    ),
    (
        {"unlisted": True},
        {"card": {"listed": False}},
        "models.a.unlisted",
        "mapped pools[].card.listed",
    ),
    ({"unlisted": "no"}, {}, "models.a.unlisted", "needless it says nothing"),
    (
        {"sendLoadingState": True},
        {"requests": {"loading_text": True}},
        "models.a.sendLoadingState",
        "mapped pools[].requests.loading_text",
    ),
    ({"timeouts": {"connect": 3, "responseHeader": 0}}, {}, "models.a.timeouts.connect", "needless engines are on this machine"),
    (
        {"timeouts": {"responseHeader": 5}},
        {},
        "models.a.timeouts.responseHeader",
        "dropped an engine that does nothing is ended by health.stall_ms; one that works is not",
    ),
    (
        {"timeouts": {"wat": 5}},
        {},
        "models.a.timeouts.wat",
        "dropped llama-swap has no such key; take it out, or check how it is written",
    ),
    ({"compat": {"ignoreWebsockets": True}}, {}, "models.a.compat", "needless web sockets load nothing here"),
    ({"healthCheckTimeout": 7}, {}, "models.a.healthCheckTimeout", "needless llama-swap goes by that of the file alone"),
    ({"macros": {"x": 1}}, {}, "models.a.macros.x", "mapped its value stands where it was used"),
    ({"macros": {}}, {}, "models.a.macros", "needless it is empty"),
    ({"wat": 1}, {}, "models.a.wat", "dropped llama-swap has no such key; take it out, or check how it is written"),
]


@pytest.mark.parametrize(("keys", "pool", "key", "became"), ROWS, ids=[f"{row[2]}-{n}" for n, row in enumerate(ROWS)])
def test_a_key_of_a_model(keys: dict[str, Any], pool: dict[str, Any], key: str, became: str) -> None:
    moved = move(model(**keys))
    assert moved.of(key) == [became]
    assert moved.pool == pool


TOP: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "healthCheckTimeout: 5",
        {"health": {"startup_timeout_ms": 15_000}},
        "healthCheckTimeout",
        "mapped health.startup_timeout_ms: for a load that stands still; one that moves goes on",
    ),
    ("globalTTL: 5", {"lifecycle": {"idle_ttl_ms": 5_000}}, "globalTTL", "mapped lifecycle.idle_ttl_ms"),
    ("globalTTL: 0", {}, "globalTTL", "needless 0, never, is the default here, too"),
    ("unloadTimeout: 20", {"supervision": {"stop_grace_ms": 20_000}}, "unloadTimeout", "mapped supervision.stop_grace_ms"),
    ("unloadTimeout: 0", {"supervision": {"stop_grace_ms": 10_000}}, "unloadTimeout", "mapped supervision.stop_grace_ms"),
    ("startPort: 65000", {"daemon": {"engine_ports": "65000-65535"}}, "startPort", "mapped daemon.engine_ports"),
    ("startPort: 70000", {}, "startPort", "dropped there are no ports from there on: set daemon.engine_ports"),
    ("logLevel: debug", {"telemetry": {"log_level": "debug"}}, "logLevel", "mapped telemetry.log_level"),
    ("logLevel: info", {}, "logLevel", "needless info is the default"),
    (
        "logToStdout: both",
        {},
        "logToStdout",
        "needless what engines print is kept apart, in bounded files: `pool-managerd logs ID`",
    ),
    ("logTimeFormat: kitchen", {}, "logTimeFormat", "needless every log line has its time"),
    ("logRequests: true", {}, "logRequests", "needless `pool-managerd requests` lists them"),
    ("store: {path: /x}", {}, "store", "dropped what was asked is kept on no disk; let Prometheus keep the metrics"),
    ("metricsMaxInMemory: 9", {}, "metricsMaxInMemory", "needless metrics are counters, not rows"),
    ("captureBuffer: 9", {}, "captureBuffer", "mapped gateway.capture_bytes"),
    ("captureBuffer: 0", {}, "captureBuffer", "needless nothing is captured"),
    (
        "ui: {activity: {session_id: [x]}}",
        {},
        "ui",
        "needless there is no web page; `pool-managerd requests` lists requests by their x-request-id",
    ),
    ("performance: {every: 5s}", {}, "performance", "needless /metrics of the daemon has them"),
    ("sendLoadingState: true", {}, "sendLoadingState", "mapped gateway.loading_text"),
    ("sendLoadingState: false", {}, "sendLoadingState", "needless it says nothing"),
    ("includeAliasesInList: true", {}, "includeAliasesInList", "needless lists have aliases with each model, in meta.aliases"),
    (
        "upstream: {ignorePaths: [x]}",
        {},
        "upstream",
        "dropped any path of /upstream/MODEL starts the model: let pages stay closed that poll it",
    ),
    (
        "profiles: {p: {pins: {x: a}}}",
        {},
        "profiles",
        "dropped names mean the same all the time here: write `aliases` of pools, and `apply` them when they change",
    ),
    (
        "peers: {p: {proxy: 'http://x', models: [m], apiKey: '${env.P_KEY}'}}",
        {},
        "peers",
        "dropped models of other machines are not passed on: let clients ask them there, or write external pools",
    ),
    ("macros: {x: 1}", {}, "macros.x", "needless nothing uses it"),
    ("x-base: &b {ttl: 5}", {}, "x-base", "needless a place for anchors: it stands where it was used"),
    ("wat: {a: 1}", {}, "wat", "dropped llama-swap has no such key; take it out, or check how it is written"),
    (
        "hooks: {on_startup: {preload: [a, b]}}",
        {},
        "hooks.on_startup.preload[1]",
        "needless there is no such model; llama-swap ignores it, too",
    ),
    (
        "hooks: {on_startup: {wat: 1}}",
        {},
        "hooks.on_startup.wat",
        "dropped llama-swap has no such key; take it out, or check how it is written",
    ),
    ("hooks:", {}, "hooks", "needless it is empty"),
    (
        "routing: {scheduler: {use: fifo, settings: {fifo: {priority: {a: 1}}}}}",
        {},
        "routing.scheduler.settings",
        "dropped requests for a loaded model go first, and nobody starves; acquire has a priority for each request",
    ),
    ("routing: {scheduler: {use: fifo}}", {}, "routing.scheduler.use", "needless first come, first served"),
]


@pytest.mark.parametrize(("text", "sections", "key", "became"), TOP, ids=[f"{row[2]}-{n}" for n, row in enumerate(TOP)])
def test_a_key_of_the_top(text: str, sections: dict[str, Any], key: str, became: str) -> None:
    moved = move(f"{text}\n{model()}")
    assert moved.of(key) == [became]
    assert {name: part for name, part in moved.values.items() if name not in ("profile", "gateway", "pools")} == sections
    assert moved.values["gateway"].get("loading_text", False) is ("gateway.loading_text" in became)
    assert moved.values["gateway"].get("capture_bytes") == ("9MiB" if "gateway.capture_bytes" in became else None)


def test_keys_of_the_gateway_are_never_copied() -> None:
    moved = move(f"apiKeys: [sk-hunter2-hunter2]\n{model()}")
    assert "hunter2" not in moved.text + str(moved.findings)
    assert moved.of("apiKeys") == [
        "dropped no key is copied: make new ones, `pool-managerd keys add NAME`, for gateway.keys_file"
    ]
    assert moved.values["gateway"] == {"bind": "127.0.0.1:8088", "keys_file": "keys.json"}


def test_secrets_of_the_environment_reach_neither_the_file_nor_the_report() -> None:
    keys = {
        "env": ["HF_TOKEN=${env.HF_TOKEN}"],
        "aliases": ["x-${env.MY_SECRET}"],
        "filters": {"setParams": {"user": "${env.MY_KEY}"}},
    }
    moved = move(
        model("llama-server -m /a --api-key ${env.MY_KEY} --alias ${env.MY_KEY}", **keys),
        {"MY_KEY": "hunter22", "HF_TOKEN": "hunter22"},
    )
    assert "hunter22" not in moved.text + str(moved.findings) and "\ue000" not in moved.text + str(moved.findings)
    assert moved.of("models.a.env HF_TOKEN") == [
        "dropped it holds a secret of the environment: set it there, as POOL_MANAGERD__POOLS__0__PROVISIONING__ENV__HF_TOKEN"
    ]
    assert len(moved.dropped()) == 5


def test_a_secret_of_the_command_is_masked_in_the_comment() -> None:
    moved = move(model("${x} -m /a --api-key sk-hunter22", macros={"x": "llama-server"}))
    assert "hunter22" not in moved.text and "--api-key ***" in moved.text


def test_a_program_that_is_not_in_path_is_told() -> None:
    moved = move(model("llama-server-b7000 -m /a"))
    assert moved.of("models.a.cmd llama-server-b7000")[0].startswith("dropped it is not in the PATH of this shell")
    assert moved.config.pools[0].provisioning.binary is not None


def test_names_that_can_be_no_id_become_aliases() -> None:
    names = ["org/m:30b", "org-m-30b", "../../etc", "日本", "", "a" * 300, "bell\x07"]
    moved = move(json.dumps({"models": {name: {"cmd": "llama-server -m /a"} for name in names}}))
    assert [pool.id for pool in moved.config.pools] == ["org-m-30b-2", "org-m-30b", "etc", "model", "model-2", "a" * 63, "bell"]
    assert [pool.aliases for pool in moved.config.pools] == [("org/m:30b",), (), ("../../etc",), ("日本",), (), (), ()]
    assert len(moved.dropped()) == 3


@pytest.mark.parametrize(
    ("selector", "aliases"),
    [
        ({"strategy": "pin", "targets": ["one", "b"]}, [["one", "sel"], []]),
        ({"strategy": "warm", "targets": ["a", "b"]}, [["one", "sel"], ["sel"]]),
        ({"strategy": "spillover", "targets": ["a", "peer/x"]}, [["one"], []]),
        ({"strategy": "odd", "targets": ["a"]}, [["one"], []]),
    ],
)
def test_a_selector_is_an_alias_that_pools_share(selector: dict[str, Any], aliases: list[list[str]]) -> None:
    models = {"a": {"cmd": "llama-server -m /a", "aliases": ["one"]}, "b": {"cmd": "llama-server -m /b"}}
    moved = move(json.dumps({"models": models, "selectors": {"sel": selector}}))
    assert [list(pool.aliases) for pool in moved.config.pools] == aliases
    assert ("selectors.sel" in moved.dropped()) == (aliases[0] == ["one"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1", "swap.yaml: cannot find any models in it"),
        ("models: []", "models: cannot use this: it must be a mapping"),
        ("models: {a: x}", "models.a: cannot use 'x': it must be a mapping"),
        (
            "models:\n  a: {cmd: x, aliases: [n]}\n  b: {cmd: x, aliases: [n]}",
            "swap.yaml:3:25: models.b.aliases[0]: cannot use the alias 'n' twice",
        ),
        ("models: {a: {cmd: x, aliases: n}}", "models.a.aliases: cannot use this: it must be a list of texts"),
        ("models: {a: {cmd: llama-server, ttl: soon}}", "models.a.ttl: cannot use 'soon': it must be a whole number"),
        ("models: {a: {cmd: llama-server, ttl: -2}}", "models.a.ttl: cannot use -2"),
        ("models: {a: {cmd: llama-server, unlisted: 3}}", "models.a.unlisted: cannot use 3: it must be true or false"),
        ("models: {a: {cmd: [x]}}", "models.a.cmd: cannot use this: it must be text"),
        ("models: {a: {cmd: 'x \"y'}}", "models.a.cmd: cannot read it: a quote in it is not closed"),
        ("models: {a: {cmd: '" + "x " * 2_000 + "'}}", "it has more than 1000 words"),
        ("models: {a: {cmd: " + "x" * 70_000 + "}}", "it is longer than 65536 characters"),
        ("models: {a: {cmd: x}, b: {cmd: x, filters: {setParamsByID: {a: {}}}}}", "it is another model's name"),
        ("models: {" + ", ".join(f"m{i}: {{cmd: x}}" for i in range(1_001)) + "}", "cannot use more than 1000 models"),
        (f"globalTTL: -1\n{model()}", "globalTTL: cannot use it"),
        (f"unloadTimeout: -1\n{model()}", "unloadTimeout: cannot use it"),
    ],
)
def test_what_cannot_be_moved_is_named_with_its_line(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        move(text)
    assert said in caught.value.message and caught.value.code == "CONFIG_ERROR"


def test_hundreds_of_models_of_nothing_but_unknown_flags_end_soon() -> None:
    text = json.dumps({"models": {f"m{i}": {"cmd": "llama-server " + f"-zz{i} " * 30} for i in range(200)}})
    began = time.monotonic()
    move(text)
    assert time.monotonic() - began < 10


words = st.text(max_size=8) | st.sampled_from(
    ["-m", "/m/a.gguf", "-c", "9", "-np", "-ts", "1,0", "--alias", "x", "-ngl", "-dev", "CUDA1"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
models = st.fixed_dictionaries(
    {"cmd": st.lists(words, max_size=8).map(lambda found: "llama-server " + json.dumps(" ".join(found))[1:-1])},
    optional={
        "aliases": st.lists(words, max_size=3),
        "env": st.lists(words | st.sampled_from(["CUDA_VISIBLE_DEVICES=0,1"]), max_size=3),
        "ttl": st.integers(-1, 99),
        "filters": st.dictionaries(st.sampled_from(["stripParams"]), words)
        | st.fixed_dictionaries({"setParams": st.dictionaries(words, values, max_size=3)})
        | st.fixed_dictionaries(
            {"setParamsByID": st.dictionaries(words, st.dictionaries(words, values, max_size=2), max_size=2)}
        ),
        "checkEndpoint": words,
        "proxy": words,
        "useModelName": words,
        "metadata": values,
        "concurrencyLimit": st.integers(0, 9),
    },
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(words, models, min_size=1, max_size=3), st.sampled_from([True, False]))
def test_whatever_is_moved_loads_or_is_refused_with_a_reason(found: dict[str, Any], vllm: bool) -> None:
    text = json.dumps({"models": found})
    if vllm:
        text = text.replace("llama-server", "vllm serve")
    try:
        move(text)
    except SpecError as error:
        assert error.code == "CONFIG_ERROR" and "cannot" in error.message
