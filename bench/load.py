"""Chats sent by a program that costs little itself (``load.c``), and what it noted."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.stub import compile_program

CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Loaded:
    """One run. Times in ms: ``first`` to the first byte of the body, ``gap`` from each piece of it to the next, ``whole`` to its
    end. ``failed``: no status 200, or cut off.
    """

    requests: int
    failed: int
    rate: float
    first_p99: float
    gap_p99: float
    whole_p50: float
    whole_p99: float


class Loads:
    """The program, compiled into ``directory``. Raises NotInstalledError without a C compiler."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._program = compile_program(directory, "load")

    def run(self, port: int, model: str, *, stream: bool, connections: int, seconds: float, spread_ms: int = 0) -> Loaded:
        """``connections`` ask for ``seconds``, each again as soon as it has its answer; the first requests are spread over
        ``spread_ms``. Raises RuntimeError when nothing came back.
        """
        body = self._directory / f"{model}-{'stream' if stream else 'short'}.json"
        body.write_text(json.dumps(chat(model, stream=stream), separators=(",", ":")))
        flags = {
            "path": CHAT_PATH, "body": body, "connections": connections, "seconds": seconds, "spread-ms": spread_ms,
        }  # fmt: skip
        argv = [str(self._program), "127.0.0.1", str(port), *(str(word) for name in flags for word in (f"--{name}", flags[name]))]
        said = subprocess.run(argv, capture_output=True, timeout=seconds + 60, check=True).stdout
        found: dict[str, Any] = json.loads(said)
        if not found["body_bytes"]:
            raise RuntimeError(f"no chat with {model} at port {port} was answered; {found['failed']} failed")
        return Loaded(
            found["requests"], found["failed"], found["rps"], found["first_p99"], found["gap_p99"], found["whole_p50"],
            found["whole_p99"],
        )  # fmt: skip


def chat(model: str, *, stream: bool) -> dict[str, Any]:
    """The body of a request."""
    return {"model": model, "messages": [{"role": "user", "content": "Is it so? Answer in one word."}], "stream": stream}
