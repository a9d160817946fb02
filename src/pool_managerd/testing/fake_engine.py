"""A scripted engine: speaks llama.cpp's HTTP, and misbehaves exactly as told. Stdlib only.

Run it as ``python fake_engine.py --port N [flags]``. Flags it does not know, such as ``--model x``, are accepted
and ignored. SIGTERM ends it with code 0 unless ``--ignore-term`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

_MAX_REQUEST_BYTES = 1 << 20
_HANG_SECONDS = 3600.0
_WORDS = ("The ", "capital ", "of ", "France ", "is ", "Paris", ".")


def options(argv: list[str]) -> argparse.Namespace:
    """The script of one run, from its flags."""
    flags = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--parallel", type=int, default=1, help="slots, as /props and /slots tell them")
    flags.add_argument("--model-id", default="fake-model")
    flags.add_argument("--ready-after", type=float, default=0.0, metavar="S", help="/health answers 503 until then")
    modes = ["ok", "503", "hang", "drip", "garbage", "big", "redirect", "close"]
    flags.add_argument("--health", choices=modes, default="ok")
    flags.add_argument("--ignore-term", action="store_true")
    flags.add_argument("--fork-grandchildren", type=int, default=0, metavar="N")
    flags.add_argument("--setsid", action="store_true", help="grandchildren in sessions of their own")
    flags.add_argument("--orphans", type=int, default=0, metavar="N", help="grandchildren without session, parent or environment")
    flags.add_argument("--leave-pipe", action="store_true", help="one grandchild that holds stdout, in its own session")
    flags.add_argument("--spam-mb-s", type=float, default=0.0, metavar="X")
    flags.add_argument("--exit-after", type=float, default=None, metavar="S", help="0 exits before binding the port")
    flags.add_argument("--exit-code", type=int, default=1)
    flags.add_argument("--signal-after", type=float, default=None, metavar="S", help="kill itself with --signal")
    flags.add_argument("--signal", type=int, default=int(signal.SIGSEGV))
    flags.add_argument("--close-port-after", type=float, default=None, metavar="S")
    flags.add_argument("--freeze-after", type=float, default=None, metavar="S", help="no further token; all else goes on")
    flags.add_argument("--core", action="store_true", help="a process of its own makes the tokens, as vLLM's engine core does")
    flags.add_argument("--busy-after", type=float, default=None, metavar="S", help="compute for --busy-for and answer nothing")
    flags.add_argument("--busy-for", type=float, default=_HANG_SECONDS, metavar="S")
    flags.add_argument("--progress-log", type=float, default=None, metavar="S", help="a line each S seconds until it is ready")
    flags.add_argument("--print-env", action="store_true")
    flags.add_argument("--token-ms", type=float, default=1.0, metavar="MS", help="time between streamed tokens")
    known, _ = flags.parse_known_args(argv)
    return known


class FakeEngine:
    """One run of the script."""

    def __init__(self, script: argparse.Namespace) -> None:
        self._script = script
        self._started = time.monotonic()
        self._listener: socket.socket | None = None
        self._work = _Work()
        self._busy_until = 0.0

    def run(self) -> NoReturn:
        """Do what the script says; ends the process."""
        script = self._script
        signal.signal(signal.SIGTERM, signal.SIG_IGN if script.ignore_term else lambda *_: os._exit(0))
        if script.print_env:
            for name, value in sorted(os.environ.items()):
                print(f"env {name}={value}")
        print(f"fake engine {os.getpid()} starts", flush=True)
        if script.exit_after == 0:
            print("fake engine gives up at once", file=sys.stderr, flush=True)
            os._exit(script.exit_code)
        self._fork_grandchildren()
        if script.core:
            self._work.fork_core()
        self._after(script.freeze_after, self._work.freeze)
        self._after(script.busy_after, self._compute)
        if script.progress_log:
            threading.Thread(target=self._log_progress, daemon=True).start()
        self._after(script.exit_after, lambda: os._exit(script.exit_code))
        self._after(script.signal_after, lambda: os.kill(os.getpid(), script.signal))
        self._after(script.close_port_after, self._close_port)
        if script.spam_mb_s:
            threading.Thread(target=self._spam, daemon=True).start()
        self._serve()

    def _after(self, seconds: float | None, action: Any) -> None:
        if seconds is not None:
            timer = threading.Timer(seconds, action)
            timer.daemon = True
            timer.start()

    def _fork_grandchildren(self) -> None:
        script = self._script
        sleeper = [sys.executable, "-I", "-S", "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"]
        for _ in range(script.fork_grandchildren):
            child = subprocess.Popen(sleeper, start_new_session=script.setsid, stdout=subprocess.DEVNULL)
            print(f"grandchild {child.pid}", flush=True)
        for _ in range(script.orphans):
            forking = ["/bin/sh", "-c", "trap '' TERM; setsid sleep 3600 >/dev/null 2>&1 & echo grandchild $!"]
            subprocess.run(forking, env={"PATH": "/usr/bin:/bin"}, check=True)
        if script.leave_pipe:
            child = subprocess.Popen(sleeper, start_new_session=True)
            print(f"grandchild {child.pid}", flush=True)

    def _spam(self) -> None:
        line = b"spam " * 200 + b"\n"
        burst = line * max(1, int(self._script.spam_mb_s * 1e6 / 100 / len(line)))
        while True:
            sys.stdout.buffer.write(burst)
            sys.stdout.buffer.flush()
            time.sleep(0.01)

    def _compute(self) -> None:
        print("fake engine computes", flush=True)
        self._busy_until = time.monotonic() + self._script.busy_for
        while time.monotonic() < self._busy_until:
            sum(range(10_000))

    def _log_progress(self) -> None:
        while not self._is_ready():
            print(f"loading, {time.monotonic() - self._started:.1f} s", flush=True)
            time.sleep(self._script.progress_log)

    def _close_port(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _serve(self) -> NoReturn:
        family = socket.AF_INET6 if ":" in self._script.host else socket.AF_INET
        self._listener = listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._script.host, self._script.port))
        except OSError as error:
            print(f"cannot bind: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        listener.listen(64)
        print(f"fake engine listens on port {listener.getsockname()[1]}", flush=True)
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                signal.pause()
                continue
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = _read_request(connection)
                while time.monotonic() < self._busy_until:
                    time.sleep(0.01)
                if request is not None:
                    self._answer(connection, *request)
            except OSError:
                pass  # the client went away

    def _answer(self, connection: socket.socket, method: str, path: str, body: dict[str, Any]) -> None:
        script = self._script
        reads: dict[str, Any] = {
            "/v1/models": {"object": "list", "data": [{"id": script.model_id, "object": "model", "owned_by": "fake"}]},
            "/props": {
                "total_slots": script.parallel,
                "build_info": "fake-1",
                "model_path": script.model_id,
                "default_generation_settings": {"n_ctx": 2048},
            },
            "/slots": [
                {"id": slot, "n_ctx": 2048, "is_processing": slot < self._work.requests} for slot in range(script.parallel)
            ],
        }
        if path in ("/health", "/v1/health"):
            self._answer_health(connection)
        elif not self._is_ready():
            _reply(connection, 503, _loading())
        elif method == "GET" and path in reads:
            _reply(connection, 200, reads[path])
        elif method == "GET" and path == "/metrics":
            _reply(connection, 200, self._work.metrics(), "text/plain")
        elif method == "POST" and path in ("/v1/completions", "/v1/chat/completions"):
            with self._work.request():
                self._complete(connection, body)
        else:
            _reply(connection, 404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}})

    def _is_ready(self) -> bool:
        return bool(time.monotonic() - self._started >= self._script.ready_after)

    def _answer_health(self, connection: socket.socket) -> None:
        mode = self._script.health
        if mode == "ok" and not self._is_ready():
            mode = "503"
        if mode == "ok":
            _reply(connection, 200, {"status": "ok"})
        elif mode == "503":
            _reply(connection, 503, _loading())
        elif mode == "hang":
            time.sleep(_HANG_SECONDS)
        elif mode == "drip":
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n" + b'{"status":"ok"}':
                connection.sendall(bytes([byte]))
                time.sleep(0.5)
        elif mode == "garbage":
            connection.sendall(b"\x00\xffthis is not HTTP\r\n\r\n")
        elif mode == "big":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
            for _ in range(1024):
                connection.sendall(b"x" * (1 << 20))
        elif mode == "redirect":
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/health\r\nContent-Length: 0\r\n\r\n")

    def _complete(self, connection: socket.socket, body: dict[str, Any]) -> None:
        limit = body.get("max_tokens")
        words = [_WORDS[index % len(_WORDS)] for index in range(limit if isinstance(limit, int) and limit > 0 else len(_WORDS))]
        each = self._script.token_ms
        timings = {
            "prompt_n": 4,
            "prompt_ms": each,
            "predicted_n": len(words),
            "predicted_ms": each * len(words),
            "predicted_per_second": 1000 / each if each else 1e6,
        }
        if not body.get("stream"):
            for _ in words:
                self._work.token(0)
            _reply(connection, 200, _whole("".join(words), timings, self._script.model_id))
            return
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for word in words:
            self._work.token(each / 1000)
            _send_event(connection, _piece(word, self._script.model_id))
        _send_event(connection, _piece("", self._script.model_id) | {"timings": timings})
        connection.sendall(b"data: [DONE]\n\n")


class _Work:
    """The tokens of one engine: made one after the other, counted, and where it has one by its core."""

    def __init__(self) -> None:
        self.requests = self._tokens = 0
        self._counting, self._turn = threading.Lock(), threading.Lock()
        self._core: subprocess.Popen[str] | None = None
        self._frozen = False

    def fork_core(self) -> None:
        code = "import sys, time\nfor line in sys.stdin: time.sleep(float(line)); print('token', flush=True)"
        pipe = subprocess.PIPE
        self._core = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=pipe, stdout=pipe, text=True, bufsize=1)
        print(f"core {self._core.pid}", flush=True)

    def freeze(self) -> None:
        self._frozen = True

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request is in work, or waits."""
        with self._counting:
            self.requests += 1
        try:
            yield
        finally:
            with self._counting:
                self.requests -= 1

    def token(self, seconds: float) -> None:
        """Return when there is one more."""
        with nullcontext() if self._core is None else self._turn:
            if self._core is None:
                time.sleep(seconds)
            elif self._core.stdin is not None and self._core.stdout is not None:
                self._core.stdin.write(f"{seconds}\n")
                self._core.stdout.readline()
        while self._frozen:
            time.sleep(0.05)
        with self._counting:
            self._tokens += 1

    def metrics(self) -> bytes:
        """What llama.cpp and vLLM tell of it."""
        tokens, requests = self._tokens, self.requests
        lines = (
            f"llamacpp:requests_processing {requests}", f"llamacpp:tokens_predicted_total {tokens}",
            f'vllm:num_requests_running{{engine="0"}} {requests}.0', f'vllm:generation_tokens_total{{engine="0"}} {tokens}.0',
        )  # fmt: skip
        return "".join(line + "\n" for line in lines).encode()


def _loading() -> dict[str, Any]:
    return {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}


def _whole(text: str, timings: dict[str, Any], model: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "text": text, "finish_reason": "stop"}
    return {"object": "chat.completion", "model": model, "choices": [choice], "timings": timings}


def _piece(word: str, model: str) -> dict[str, Any]:
    """One chunk of a stream; the last one has no word."""
    choice = {"index": 0, "delta": {"content": word} if word else {}, "text": word, "finish_reason": None if word else "stop"}
    return {"object": "chat.completion.chunk", "model": model, "choices": [choice]}


def _send_event(connection: socket.socket, event: dict[str, Any]) -> None:
    connection.sendall(b"data: " + json.dumps(event).encode() + b"\n\n")


def _reply(connection: socket.socket, status: int, content: Any, kind: str = "application/json") -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)


def _read_request(connection: socket.socket) -> tuple[str, str, dict[str, Any]] | None:
    """Method, path and JSON body of the one request that a connection carries."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more or len(data) > _MAX_REQUEST_BYTES:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    method, path, *_ = [*lines[0].split(), "", ""]
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length = int(headers.get("content-length", "0") or 0)
    while len(body) < min(length, _MAX_REQUEST_BYTES):
        more = connection.recv(65536)
        if not more:
            return None
        body += more
    try:
        content = json.loads(body) if body else {}
    except ValueError:
        content = {}
    return method, path.partition("?")[0], content if isinstance(content, dict) else {}


if __name__ == "__main__":
    FakeEngine(options(sys.argv[1:])).run()
