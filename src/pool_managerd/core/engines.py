"""The engines that can be configured: of each, what is known without loading its adapter.

To add an engine, write a line here. One that is to be run here, not attached to alone, gets a module of its name in
``engines/``, too, with an ``ADAPTER`` (`engines.adapter`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from pool_managerd.core.question import Question
from pool_managerd.core.sleep_dialect import SleepDialect

DEFAULT_ENGINE = "llamacpp"
"""What an engine is taken for whose handoff file or submission does not say."""


@dataclass(frozen=True, slots=True)
class CounterNames:
    """What an engine tells of its own work, as Prometheus text at ``path``.

    ``tokens`` grow with the work done: tokens, or steps of the model; ``requests`` are gauges of those running and waiting.
    """

    tokens: tuple[str, ...]
    requests: tuple[str, ...]
    path: str = "/metrics"


@dataclass(frozen=True, slots=True)
class EngineKind:
    """``modes``: how this version can provision it; ``external`` attaches to a running one. ``program``: what its own is called.

    ``package`` is the Python package that carries it, ``install`` the command that gets it. ``startup_ms``: how long it may
    take until it answers, where that is longer than usual: some compile, capture and profile before. ``log`` names the rules
    of `core.crash_evidence` that read its log; without, those for any program do. ``counters`` tell work from a standstill.
    ``sleep``: how one is put to sleep that is able to. One that ``knows_its_name`` refuses requests for a model of another.
    """

    modes: tuple[str, ...]
    health_path: str = "/health"
    startup_ms: int | None = None
    log: str = ""
    program: str = "program"
    package: str | None = None
    install: str = ""
    counters: CounterNames | None = None
    sleep: SleepDialect | None = None
    knows_its_name: bool = False


ENGINES: Mapping[str, EngineKind] = {
    "llamacpp": EngineKind(
        ("package", "binary", "external"), log="llamacpp", program="llama-server binary", package="xllamacpp",
        install="pip install 'pool-managerd[llamacpp]'",
        # Prompt and generated tokens are told when a request ends; the calls of llama_decode grow all the time.
        counters=CounterNames(
            ("llamacpp:n_decode_total", "llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total"),
            ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
        ),
        sleep=SleepDialect("--sleep-idle-seconds", Question("/props"), Question("/completion", {"prompt": "", "n_predict": 0})),
    ),
    "vllm": EngineKind(
        ("binary", "external"), startup_ms=900_000, log="vllm", program="vllm command",
        counters=CounterNames(
            ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
            ("vllm:num_requests_running", "vllm:num_requests_waiting"),
        ),
        # Level 1: the weights stay in RAM. After level 2 some versions answer nonsense.
        sleep=SleepDialect(
            "--enable-sleep-mode", Question("/is_sleeping"), Question("/wake_up", {}), Question("/sleep?level=1", {}),
            needs="VLLM_SERVER_DEV_MODE=1 in its environment, which opens other routes, too",
        ),
        knows_its_name=True,
    ),
    "tgi": EngineKind(
        ("external",), startup_ms=900_000,
        counters=CounterNames(("tgi_batch_inference_count",), ("tgi_batch_current_size", "tgi_queue_size")),
    ),
    # Triton tells its counters on another port, which a pool does not name.
    "triton": EngineKind(("external",), health_path="/v2/health/ready", startup_ms=300_000),
}  # fmt: skip
"""One line per engine. Nothing else lists them."""


def known_engine(name: str) -> str:
    """``name``. Raises ValueError, saying what was probably meant, where no engine is called that."""
    if name in ENGINES:
        return name
    *others, last = map(repr, ENGINES)
    near = difflib.get_close_matches(name, ENGINES, n=1)
    raise ValueError(f"must be {', '.join(others)} or {last}" + (f" (did you mean {near[0]!r}?)" if near else ""))


def startup_ms(engine: str, usual: int) -> int:
    """How long ``engine``, which may be none that is known, has to answer for the first time."""
    kind = ENGINES.get(engine)
    return (kind.startup_ms if kind is not None else None) or usual
