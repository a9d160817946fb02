"""What the gateway is measured beside: llama-swap with an engine of its own, and nginx in front of ours."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.daemon import answers, request
from bench.load import CHAT_PATH, chat
from bench.processes import running, wait_until
from bench.result import NotInstalledError
from bench.stub import free_ports

_AT_ONCE = 64
_NGINX = """
daemon off; pid {directory}/nginx.pid; error_log {directory}/nginx-error.log; worker_processes auto; user {user};
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {directory}/nginx-temp; proxy_temp_path {directory}/nginx-temp; fastcgi_temp_path {directory}/nginx-temp;
  uwsgi_temp_path {directory}/nginx-temp; scgi_temp_path {directory}/nginx-temp;
  upstream engine {{ server 127.0.0.1:{engine_port}; keepalive {at_once}; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 1000000000;
    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""


@contextlib.contextmanager
def llama_swap(directory: Path, engines: Mapping[str, Sequence[str]]) -> Iterator[int]:
    """The port of llama-swap with the first of these models loaded, of which it loads one at a time; each engine is given a port.

    The program is the one that the environment names in LLAMA_SWAP, or else the one on PATH. Raises NotInstalledError.
    """
    program = _find("llama-swap", os.environ.get("LLAMA_SWAP"))
    (port,), (engine_port, *_) = free_ports(1, 19_600), free_ports(len(engines), 15_000)
    config = {
        "startPort": engine_port,
        "logLevel": "warn",  # else it logs every request, which nobody else here does
        "models": {
            model: {"cmd": shlex.join(engine) + " --port ${PORT}", "checkEndpoint": "/health", "concurrencyLimit": _AT_ONCE}
            for model, engine in engines.items()
        },
    }
    path = directory / "llama-swap.yaml"
    path.write_text(json.dumps(config))
    argv = [program, "-config", str(path), "-listen", f"127.0.0.1:{port}"]
    with running(argv, directory / "llama-swap.log", cwd=directory):
        first = next(iter(engines))
        wait_until(lambda: _chats(port, first), "llama-swap to load its model", 30.0, every_s=0.2)
        yield port


@contextlib.contextmanager
def nginx(directory: Path, engine_port: int) -> Iterator[int]:
    """The port of nginx in front of the engine. Raises NotInstalledError."""
    program = _find("nginx")
    (port,) = free_ports(1, 19_700)
    config = directory / "nginx.conf"
    user = "root" if os.geteuid() == 0 else "nobody"  # without root nobody is changed to, and it only warns
    config.write_text(
        _NGINX.format(directory=directory, engine_port=engine_port, port=port, user=user, at_once=_AT_ONCE),
    )
    with running([program, "-c", str(config), "-p", str(directory)], directory / "nginx.log", cwd=directory):
        wait_until(lambda: answers(port), "nginx to answer", 20.0)
        yield port


def _chats(port: int, model: str) -> bool:
    try:
        return request(port, "POST", CHAT_PATH, chat(model, stream=False), timeout_s=30.0)[0] == 200
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _find(program: str, named: str | None = None) -> str:
    found = shutil.which(named or program)
    if found is None:
        raise NotInstalledError(f"{named or program} is not installed")
    return found
