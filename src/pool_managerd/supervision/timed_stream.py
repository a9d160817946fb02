"""One streamed completion, timed piece by piece, with everything bounded."""

from __future__ import annotations

import json
import time
from typing import Any

import aiohttp

from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.bench import TimedAnswer
from pool_managerd.core.narration import printable

_ERROR_BYTES = 16 * 1024
_LEAST_BYTES, _TOKEN_BYTES = 256 * 1024, 8 * 1024
_MAX_LINE_BYTES = 256 * 1024


async def timed(session: aiohttp.ClientSession, engine: AnyEngine, prompt: str, tokens: int) -> TimedAnswer:
    """Ask ``engine`` for exactly ``tokens`` behind ``prompt``. Raises aiohttp.ClientError, or ValueError with what was wrong."""
    body: dict[str, Any] = {
        "model": engine.model_id or "", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if engine.engine == "llamacpp":
        body["cache_prompt"] = False
    stream = _Stream()
    left = _LEAST_BYTES + _TOKEN_BYTES * tokens
    # A redirect would have the daemon post wherever the engine says.
    asked = session.post(f"{engine.url}/v1/completions", json=body, allow_redirects=False, read_bufsize=_MAX_LINE_BYTES)
    async with asked as response:
        if response.status != 200:
            raise ValueError(f"the engine answered {response.status}{_why(await response.content.read(_ERROR_BYTES))}")
        try:
            async for line in response.content:
                left -= len(line)
                if left < 0:
                    response.close()
                    raise ValueError("the engine answered with far more than was asked for")
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    stream.feed(line[5:])
        except aiohttp.http_exceptions.HttpProcessingError:
            response.close()
            raise ValueError("the engine streamed a line without an end") from None
    return stream.answer()


class _Stream:
    """What came, and when."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._times: list[float] = []
        self._usage: dict[str, Any] = {}
        self._timings: dict[str, Any] = {}

    def feed(self, data: bytes) -> None:
        now = time.monotonic() - self._began
        try:
            chunk = json.loads(data)
        except RecursionError:
            raise ValueError("the engine streamed something that is nested too deeply") from None
        if not isinstance(chunk, dict):
            raise ValueError("the engine streamed something that is no completion")
        if isinstance(problem := chunk.get("error"), dict):
            raise ValueError(f"the engine broke off: {_short(problem.get('message'))}")
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        # A piece may have no text: half of a sign that the next token ends.
        if choice.get("text") or (choice.get("text") == "" and choice.get("finish_reason") is None):
            self._times.append(now)
        for name in ("usage", "timings"):
            if isinstance(told := chunk.get(name), dict):
                setattr(self, f"_{name}", told)

    def answer(self) -> TimedAnswer:
        """Raises ValueError when hardly anything came."""
        if len(self._times) < 2:
            raise ValueError("the engine answered with fewer than two tokens")
        made = _number(self._usage.get("completion_tokens")) or _number(self._timings.get("predicted_n"))
        read = _number(self._usage.get("prompt_tokens")) or _number(self._timings.get("prompt_n"))
        rate = _number(self._timings.get("prompt_per_second"))
        return TimedAnswer(
            tuple(self._times), int(made or len(self._times)), None if read is None else int(read), rate
        )  # fmt: skip


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 < value < 1e9 else None


def _why(text: bytes) -> str:
    """The words of an error's body, if it has some."""
    try:
        problem = json.loads(text)["error"]
        return f": {_short(problem['message'] if isinstance(problem, dict) else problem)}"
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _short(text: Any) -> str:
    return printable(str(text)[:300])
