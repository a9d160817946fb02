"""Asking an engine a question through its OpenAI-compatible API, with the answer shown as it is made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from pool_managerd.errors import EngineError

SYSTEM = "You are a helpful assistant."
_TIMEOUT_S = 120
_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """The text, and how fast it came. ``first_token_ms`` counts from sending the request."""

    text: str
    tokens: int
    first_token_ms: float
    tokens_per_s: float


async def ask(
    session: aiohttp.ClientSession, url: str, question: str, show: Callable[[str], None], model: str | None = None,
    *, tokens: int = _MAX_TOKENS, indent: str = "  ",
) -> Answer:  # fmt: skip
    """Stream one answer at temperature 0, of an engine, or of ``model`` at the gateway's URL, of so many ``tokens`` at most.

    Raises EngineError when it refuses or says nothing.
    """
    body = {
        **({} if model is None else {"model": model}),
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
    }
    began = time.monotonic()
    first = last = 0.0
    pieces: list[str] = []
    timings: dict[str, Any] = {}
    async with session.post(f"{url}/v1/chat/completions", json=body, timeout=aiohttp.ClientTimeout(_TIMEOUT_S)) as response:
        if response.status != 200:
            raise EngineError(f"cannot get an answer: the engine said {response.status}", hint="pool-managerd logs shows why")
        async for line in response.content:
            chunk = _chunk(line)
            timings = chunk.get("timings") or timings
            if piece := _piece(chunk):
                last = time.monotonic()
                first = first or last
                show((indent if not pieces else "") + piece)
                pieces.append(piece)
    if not pieces:
        raise EngineError("cannot get an answer: the engine said nothing", hint="pool-managerd logs shows why")
    received = int(timings.get("predicted_n") or len(pieces))
    measured = (len(pieces) - 1) / (last - first) if last > first else 0.0
    return Answer("".join(pieces), received, (first - began) * 1000, float(timings.get("predicted_per_second") or measured))


def _chunk(line: bytes) -> dict[str, Any]:
    data = line.removeprefix(b"data: ").strip()
    if not line.startswith(b"data: ") or data == b"[DONE]":
        return {}
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _piece(chunk: dict[str, Any]) -> str:
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    delta = choices[0].get("delta") or {}
    return str(delta.get("content") or "")
