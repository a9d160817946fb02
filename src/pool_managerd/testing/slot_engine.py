"""A scripted engine that has slots: it saves and restores them as llama-server does, or says so and does not. Stdlib only.

Run it as ``python slot_engine.py --port N --slot-save-path DIR [--restores nothing]``. A prompt is a list of tokens or a text of
words; what of it was in the slot is told as llama.cpp tells it. Flags it does not know are accepted and ignored.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

_MAGIC = 0x67677371
_MAX_REQUEST_BYTES = 64 << 20


def options(argv: list[str]) -> argparse.Namespace:
    """The script of one run, from its flags."""
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--parallel", type=int, default=1)
    flags.add_argument("--slot-save-path", default="")
    flags.add_argument("--restores", choices=["all", "nothing"], default="all", help="nothing: it says that it did")
    return flags.parse_known_args(argv)[0]


class SlotEngine:
    """What is in its slots: tokens."""

    def __init__(self, script: argparse.Namespace) -> None:
        self._script = script
        self._slots: list[list[int]] = [[] for _ in range(script.parallel)]

    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        """(status, answer) of one request."""
        if path == "/health":
            return 200, {"status": "ok"}
        if path == "/slots":
            return 200, [
                {"id": slot, "is_processing": False, "n_prompt_tokens": len(held)} for slot, held in enumerate(self._slots)
            ]
        if path.startswith("/slots/"):
            return self._save_or_restore(int(path.rpartition("/")[2]), query["action"][0], str(body.get("filename")))
        if path in ("/completion", "/v1/completions", "/v1/chat/completions"):
            return 200, self._complete(body)
        return 404, {"error": {"code": 404, "message": "File Not Found"}}

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body.get("prompt", json.dumps(body.get("messages", "")))
        tokens = prompt if isinstance(prompt, list) else [len(word) for word in prompt.split()]
        slot = body.get("id_slot", 0)
        held = self._slots[slot]
        cached = next((at for at, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b), min(len(held), len(tokens)))
        self._slots[slot] = list(tokens)
        told = {"cache_n": min(cached, len(tokens) - 1), "prompt_n": len(tokens) - cached, "predicted_per_second": 50.0}
        choice = {"index": 0, "text": "Paris", "message": {"role": "assistant", "content": "Paris"}, "finish_reason": "stop"}
        return {"choices": [choice], "timings": told}

    def _save_or_restore(self, slot: int, action: str, name: str) -> tuple[int, Any]:
        path = Path(self._script.slot_save_path) / Path(name).name
        if action == "save":
            held = self._slots[slot]
            data = struct.pack(f"<III{len(held)}i", _MAGIC, 2, len(held), *held) + bytes(8 * len(held))
            path.write_bytes(data)
            return 200, {"id_slot": slot, "n_saved": len(held), "n_written": len(data)}
        data = path.read_bytes()
        count = struct.unpack_from("<I", data, 8)[0]
        if self._script.restores == "all":
            self._slots[slot] = list(struct.unpack_from(f"<{count}i", data, 12))
        return 200, {"id_slot": slot, "n_restored": count, "n_read": len(data)}


def serve(script: argparse.Namespace) -> None:
    """Until SIGTERM."""
    engine = SlotEngine(script)

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, body: dict[str, Any]) -> None:
            parts = urlsplit(self.path)
            try:
                status, content = engine.answer(parts.path, parse_qs(parts.query), body)
            except (OSError, ValueError, LookupError, struct.error) as problem:
                status, content = 400, {"error": {"code": 400, "message": repr(problem)}}
            streams = body.get("stream") and status == 200
            text = json.dumps(content)
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
