"""A scripted engine that sleeps as vLLM does, or says so and does not. Stdlib only.

Run it as ``python sleepy_engine.py --port N --enable-sleep-mode [--sleeps …] [--wakes …]``. What it would hold on a GPU is memory
of its own here. Flags it does not know are accepted and ignored.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_MAX_REQUEST_BYTES = 1 << 20
_HANG_SECONDS = 3600.0
_PAGE = 4096


def options(argv: list[str]) -> argparse.Namespace:
    """The script of one run, from its flags."""
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--enable-sleep-mode", action="store_true")
    flags.add_argument("--weights-mib", type=int, default=100, help="what it holds while it is awake")
    flags.add_argument("--dev-routes", choices=["there", "missing"], default="there", help="missing: without its dev mode")
    flags.add_argument("--sleeps", choices=["well", "holding", "never", "hanging", "dying"], default="well")
    flags.add_argument("--wakes", choices=["well", "never", "hanging", "dying"], default="well")
    return flags.parse_known_args(argv)[0]


class SleepyEngine:
    """Asleep it answers 503 to whoever wants tokens."""

    def __init__(self, script: argparse.Namespace) -> None:
        self._script = script
        self._asleep = False
        self._weights = _held(script.weights_mib)

    def answer(self, path: str) -> tuple[int, Any]:
        """(status, answer) of one request; None is an empty one."""
        if path == "/health":
            return 200, None
        if path == "/metrics":
            return 200, 'vllm:num_requests_running{engine="0"} 0.0\nvllm:generation_tokens_total{engine="0"} 1.0\n'
        if path in ("/sleep", "/wake_up", "/is_sleeping") and self._script.enable_sleep_mode:
            return (404, {"detail": "Not Found"}) if self._script.dev_routes == "missing" else self._change(path)
        if path in ("/v1/completions", "/v1/chat/completions"):
            choice = {"index": 0, "text": "four", "message": {"role": "assistant", "content": "four"}, "finish_reason": "stop"}
            return (503, {"error": "The model is sleeping"}) if self._asleep else (200, {"choices": [choice]})
        return 404, {"detail": "Not Found"}

    def _change(self, path: str) -> tuple[int, Any]:
        if path == "/is_sleeping":
            return 200, {"is_sleeping": self._asleep}
        how = self._script.sleeps if path == "/sleep" else self._script.wakes
        sys.stderr.write(f"{path}: {how}\n")
        if how == "hanging":
            time.sleep(_HANG_SECONDS)
        if how == "dying":
            os._exit(1)
        if how == "never":
            return 500, {"error": {"message": "CUDA error: out of memory"}}
        self._asleep = path == "/sleep"
        if how == "well":
            self._weights = bytearray() if self._asleep else _held(self._script.weights_mib)
        return 200, None


def _held(mib: int) -> bytearray:
    """Memory that is really there."""
    memory = bytearray(mib << 20)
    for page in range(0, len(memory), _PAGE):
        memory[page] = 1
    return memory


def serve(script: argparse.Namespace) -> None:
    """Until SIGTERM."""
    engine = SleepyEngine(script)

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, body: dict[str, Any]) -> None:
            status, content = engine.answer(urlsplit(self.path).path)
            streams = body.get("stream") and status == 200
            text = "" if content is None else content if isinstance(content, str) else json.dumps(content)
            data = (f"data: {text}\n\ndata: [DONE]\n\n" if streams else text).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream" if streams else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            length = min(int(self.headers.get("Content-Length", "0")), _MAX_REQUEST_BYTES)
            self._reply(json.loads(self.rfile.read(length) or b"{}"))

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not told."""

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ThreadingHTTPServer((script.host, script.port), Handler).serve_forever()


if __name__ == "__main__":
    serve(options(sys.argv[1:]))
