"""Asking an engine how it is, over HTTP, with everything bounded."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import aiohttp

from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.bench import TimedAnswer
from pool_managerd.core.engines import CounterNames
from pool_managerd.core.health import Counters, ProbeOutcome, ProbeResult, check_response, read_counters
from pool_managerd.core.question import Question
from pool_managerd.supervision import plain_http
from pool_managerd.supervision.timed_stream import timed

BODY_LIMIT = 64 * 1024
COUNTERS_LIMIT = 1 << 20
LATE_S = 0.25
"""A time-out that is noticed so much too late says that this loop stood, and nothing of the engine (J3)."""
WARMUP_BODY_LIMIT = 256 * 1024
WARMUP_TOKENS = 16
COMPLETION_TOKENS = 64
ANSWER_LIMIT = 16 << 20
"""Some engines send the prompt back."""
_SINGLE_ANSWERS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType({
    "embedding": ("/v1/embeddings", {"input": "Once upon a time"}),
    "rerank": ("/v1/rerank", {"query": "Once upon a time", "documents": ["there was a king", "two and two"]}),
})  # fmt: skip
_TOKENS = re.compile(rb'"total_tokens":\s?(\d{1,9})')
_OUR_OWN_FAULT = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM}


class HttpProber:
    """One session for all pools. Redirects are not followed, bodies are capped and never decompressed (C5)."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def probe(self, url: str, timeout_s: float) -> ProbeResult:
        """One GET within ``timeout_s`` in total."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(url)
        except TimeoutError:
            if (late_s := time.monotonic() - began - timeout_s) > LATE_S:
                return ProbeResult(ProbeOutcome.DISCARDED, f"could not be judged: the daemon itself stood for {late_s:.2g} s")
            return ProbeResult(ProbeOutcome.TIMEOUT, f"had no answer within {timeout_s:g} s")
        except aiohttp.ClientConnectorError as problem:
            return _refused(problem)
        except (aiohttp.ServerDisconnectedError, ConnectionAbortedError):
            return ProbeResult(ProbeOutcome.ERROR, "was cut off without an answer")
        except OSError as problem:
            return _os_result(problem)
        except (aiohttp.ClientError, ValueError) as problem:
            what = str(problem) or type(problem).__name__
            return ProbeResult(ProbeOutcome.ERROR, f"was answered with something that is not HTTP ({what})")

    async def _ask(self, url: str) -> ProbeResult:
        answer = await self._get(url, BODY_LIMIT)
        if answer.body is None:
            return ProbeResult(ProbeOutcome.ERROR, f"answered {answer.status} with more than {BODY_LIMIT // 1024} KiB")
        if answer.server == "pool-managerd":
            return ProbeResult(ProbeOutcome.ERROR, "was answered by a pool-managerd, which is no engine")
        return check_response(answer.status, answer.content_type, answer.body)

    async def _get(self, url: str, limit: int) -> plain_http.Answer:
        if (plain := plain_http.target(url)) is not None:
            return await plain_http.get(plain, limit)
        async with self._open().get(url, allow_redirects=False, headers={"Connection": "close"}) as response:
            body = b""
            while len(body) <= limit and (more := await response.content.read(limit + 1 - len(body))):
                body += more
            kind, server = response.headers.get("Content-Type", ""), response.headers.get("Server", "")
            if len(body) > limit:
                response.close()
            return plain_http.Answer(response.status, kind, server, body if len(body) <= limit else None)

    async def counters(self, url: str, names: CounterNames, timeout_s: float) -> Counters | None:
        """What the engine says of its work; None when it has no such counters.

        Raises TimeoutError when it does not answer; aiohttp.ClientError, OSError or ValueError when it cannot be asked.
        """
        async with asyncio.timeout(timeout_s):
            answer = await self._get(url + names.path, COUNTERS_LIMIT)
        return None if answer.status != 200 or answer.body is None else read_counters(answer.body, names)

    async def warm_up(self, engine: AnyEngine, timeout_s: float) -> tuple[float, float]:
        """A short request of the kind that the engine serves: (first_token_ms, tokens_per_s).

        Of a completion the first token is timed as a client sees it; the rate is the engine's own figure when it gives one
        (llama.cpp does), else a client's. An embedding or a ranking has one answer: its time, and the tokens it read. Raises
        TimeoutError, aiohttp.ClientError or ValueError when it does not answer as it should.
        """
        if engine.warmup != "completion":
            return await self._ask_once(engine, timeout_s)
        # Greedy and the same each time, so that two measurements can be compared.
        body = {
            "model": engine.model_id or "",
            "prompt": "Once upon a time",
            "max_tokens": WARMUP_TOKENS,
            "temperature": 0,
            "stream": True,
        }
        meter = _Meter()
        # A redirect would have the daemon post wherever the engine says.
        asked = self._open().post(f"{engine.url}/v1/completions", json=body, allow_redirects=False)
        left = WARMUP_BODY_LIMIT
        async with asyncio.timeout(timeout_s), asked as response:
            if response.status != 200:
                raise ValueError(f"the engine answered {response.status}")
            try:
                async for line in response.content:
                    left -= len(line)
                    if left < 0:
                        response.close()
                        raise ValueError(f"the engine answered with more than {WARMUP_BODY_LIMIT // 1024} KiB")
                    if line.startswith(b"data:") and b"[DONE]" not in line:
                        meter.feed(json.loads(line[5:]))
            except RecursionError:
                raise ValueError("the engine streamed something that is nested too deeply") from None
            except aiohttp.http_exceptions.HttpProcessingError:
                response.close()
                raise ValueError("the engine streamed a line without an end") from None
        return meter.result()

    async def complete(self, engine: AnyEngine, prompt: str, timeout_s: float) -> str:
        """What the engine makes of ``prompt``, in a few tokens. Raises as ``warm_up``."""
        body = {
            "model": engine.model_id or "", "prompt": prompt, "max_tokens": COMPLETION_TOKENS, "temperature": 0, "stream": False,
        }  # fmt: skip
        asked = self._open().post(f"{engine.url}/v1/completions", json=body, allow_redirects=False)
        async with asyncio.timeout(timeout_s), asked as response:
            if response.status != 200:
                raise ValueError(f"the engine answered {response.status}")
            text = await response.content.read(BODY_LIMIT)
        try:
            choices = json.loads(text)["choices"]
            return str(choices[0]["text"])
        except (RecursionError, LookupError, TypeError):
            raise ValueError("the engine answered with something that is no completion") from None

    async def ask(self, url: str, question: Question) -> Any:
        """The engine's answer to ``question``, as JSON, None where it is empty; the caller bounds the time.

        Raises ValueError with what it says where it refuses, or answers with something else; aiohttp.ClientError, OSError.
        """
        # In a thread: a prompt of a hundred thousand tokens takes a moment to write.
        body = None if question.body is None else (await asyncio.to_thread(json.dumps, question.body)).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        asked = self._open().request(
            "GET" if body is None else "POST", url + question.path, data=body, headers=headers, allow_redirects=False
        )
        async with asked as response:
            text = b""
            while len(text) <= ANSWER_LIMIT and (more := await response.content.read(ANSWER_LIMIT + 1 - len(text))):
                text += more
            if len(text) > ANSWER_LIMIT:
                response.close()
                raise ValueError(f"the engine answered with more than {ANSWER_LIMIT >> 20} MiB")
            if response.status != 200:
                raise ValueError(f"the engine answered {response.status}: {_said(text)}")
        if not text:
            return None
        try:
            return await asyncio.to_thread(json.loads, text)
        except RecursionError:
            raise ValueError("the engine answered with something that is nested too deeply") from None

    async def prime(self, engine: AnyEngine, prompt: str, timeout_s: float) -> float:
        """Have the engine read ``prompt`` as the system's; in how many ms. Raises as ``warm_up``."""
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": "."}]
        body = {"model": engine.model_id or "", "messages": messages, "max_tokens": 1, "temperature": 0}
        began = time.monotonic()
        async with asyncio.timeout(timeout_s):
            await self.ask(engine.url, Question("/v1/chat/completions", body))
        return (time.monotonic() - began) * 1000

    async def timed(self, engine: AnyEngine, prompt: str, tokens: int) -> TimedAnswer:
        """As `timed_stream.timed`: for as long as the engine takes. Whoever does not want to wait any longer cancels it."""
        return await timed(self._open(), engine, prompt, tokens)

    async def _ask_once(self, engine: AnyEngine, timeout_s: float) -> tuple[float, float]:
        """One embedding or ranking: how long it took in ms, and tokens read per second."""
        route, asked = _SINGLE_ANSWERS[engine.warmup]
        began = time.monotonic()
        body = {"model": engine.model_id or "", **asked}
        async with asyncio.timeout(timeout_s), self._open().post(
            engine.url + route, json=body, allow_redirects=False
        ) as response:  # fmt: skip
            if response.status != 200:
                raise ValueError(f"the engine answered {response.status}")
            text = await response.content.read(BODY_LIMIT)
        took_s = max(time.monotonic() - began, 1e-3)
        told = _TOKENS.search(text)
        return took_s * 1000, (int(told[1]) if told else 1) / took_s

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True, use_dns_cache=False)
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, trust_env=False, timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
            )  # fmt: skip
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Meter:
    """Times the pieces of a streamed completion."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: float | None = None
        self._last = self._began
        self._pieces = 0
        self._reported: float | None = None

    def feed(self, chunk: Any) -> None:
        """One event of the stream. Raises ValueError when it is no completion chunk."""
        if not isinstance(chunk, dict):
            raise ValueError("the engine streamed something that is no completion")
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict) and choices[0].get("text"):
            self._pieces += 1
            self._last = time.monotonic()
            self._first = self._first or self._last
        timings = chunk.get("timings")
        rate = timings.get("predicted_per_second") if isinstance(timings, dict) else None
        if isinstance(rate, int | float) and 0 < rate < 1e9:
            self._reported = float(rate)

    def result(self) -> tuple[float, float]:
        """(first_token_ms, tokens_per_s). Raises ValueError when no token came."""
        if self._first is None:
            raise ValueError("the engine answered without a token")
        seen = (self._pieces - 1) / max(self._last - self._first, 1e-3) if self._pieces > 1 else 1 / (self._first - self._began)
        return (self._first - self._began) * 1000, self._reported or seen


def _said(text: bytes) -> str:
    """What an error answer says, in short."""
    try:
        told = json.loads(text)["error"]
        return str(told["message"] if isinstance(told, dict) else told)[:200]
    except (ValueError, LookupError, TypeError, RecursionError):
        return text[:100].decode("utf-8", "replace")


def _refused(problem: aiohttp.ClientConnectorError) -> ProbeResult:
    if isinstance(problem, aiohttp.ClientConnectorDNSError):
        return ProbeResult(ProbeOutcome.ERROR, "could not find the host by its name")
    return _os_result(problem.os_error)


def _os_result(problem: OSError) -> ProbeResult:
    """The prober's own trouble says nothing about the engine (C11, H15)."""
    if problem.errno in _OUR_OWN_FAULT:
        return ProbeResult(ProbeOutcome.DISCARDED, f"could not be sent: {problem.strerror}")
    if isinstance(problem, ConnectionRefusedError):
        return ProbeResult(ProbeOutcome.ERROR, "was refused: nothing listens on the port", refused=True)
    if isinstance(problem, ConnectionResetError):
        return ProbeResult(ProbeOutcome.ERROR, "was reset")
    return ProbeResult(ProbeOutcome.ERROR, f"failed: {problem.strerror or problem}")
