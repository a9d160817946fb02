"""``pool-managerd run``: one model and nothing to configure, on a node of its own that ends with the command."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic import ValidationError

from pool_managerd._version import __version__
from pool_managerd.cli.ask import ask
from pool_managerd.cli.demo import Screen
from pool_managerd.cli.exits import NO, OK, USAGE, CommandFailed
from pool_managerd.cli.output import printable, program
from pool_managerd.config import Config, PoolConfig
from pool_managerd.config.load import load_config
from pool_managerd.core.engines import ENGINES
from pool_managerd.core.narration import count, size
from pool_managerd.daemon import Served, serving, stop_node
from pool_managerd.daemon.signals import Signals
from pool_managerd.errors import PoolError
from pool_managerd.gateway.embedded import open_gateway
from pool_managerd.telemetry.logs import LogOptions, configure_logging
from pool_managerd.wiring import preflight

if TYPE_CHECKING:
    from pool_managerd.wiring.model_calls import Proposal

_NAMED = re.compile(r"(hf|https?|oci|s3|ollama|local)(?=:)", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_FOR_VLLM = re.compile(r"hf:[^/]+/[^/:]+", re.IGNORECASE)
_LOOK_S = 0.5
USUAL_PORT, USUAL_TOKENS = 8088, 2_048


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was typed. What is None is worked out."""

    ref: str
    pool_id: str | None = None
    ctx: int | None = None
    slots: int = 1
    devices: str | None = None
    message: str | None = None
    bind: str | None = None
    dry_run: bool = False


def run_model(wishes: Wishes, file: Path | None) -> int:
    """The exit code: 0 when it ran, or would; 1 otherwise. Nothing is left but what was fetched."""
    logs = configure_logging(LogOptions(__version__, level="error"))
    folder = Path(tempfile.mkdtemp(prefix="pool-managerd-run-"))
    folder.chmod(0o755)  # engines have users of their own, who must be able to walk through
    screen = Screen(sys.stderr)  # what is answered stands alone on stdout
    try:
        config = run_config(wishes, file, folder)
        if config.daemon.engine_user == "root":
            why = "no other user may go where its model, or this program, lies"
            screen.step(f"The engine runs as root (daemon.engine_user: root), without isolation: {why}", mark="!")
        code = asyncio.run(_run(config, _wanted(wishes), wishes, screen))
        if screen.lost is not None:
            raise screen.lost
        return code
    except PoolError as error:
        screen.failed(error.message, error.hint)
        return NO
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        logs.close()


# --- what is worked out ---


def run_config(wishes: Wishes, file: Path | None, folder: Path) -> Config:
    """A node without pools, all of its files but fetched models below ``folder``. Who types a reference wants it fetched, unless
    a configuration says otherwise. Raises SpecError.
    """
    given = load_config(file, env=os.environ) if file is not None else None
    base = given or Config.model_validate({"base_dir": Path.cwd()})
    cache = base.model_cache if given is not None else default_cache()
    remote = _NAMED.match(wishes.ref)
    policy = base.policy
    if given is None and remote is not None:
        policy = policy.model_copy(update={"allow_network": True, "allow_schemes": ("file", remote[1].lower())})
    no_gpu = base.profile != "dev" and preflight.scan_once(base).no_gpus
    reach = Path(wishes.ref.removeprefix("file:")).absolute() if remote is None else _nearest(cache)
    as_root = preflight.needs_root(reach, folder) is not None
    daemon = base.daemon.model_copy(update={
        "bind": "127.0.0.1:0", "metrics_bind": None, "runtime_dir": folder / "runtime", "state_dir": folder / "state",
        "engine_user": "root" if as_root else base.daemon.engine_user,
    })  # fmt: skip
    return base.model_copy(update={
        "profile": "dev" if no_gpu else base.profile, "daemon": daemon, "pools": (), "base_dir": Path.cwd(), "policy": policy,
        "models": base.models.model_copy(update={"cache_dir": cache.absolute()}),
    })  # fmt: skip


def default_cache() -> Path:
    """Where models stay that were fetched for it: root's where engines of other users can read them."""
    given = os.environ.get("XDG_CACHE_HOME")
    home = Path(given) if given else Path("/var/cache") if os.geteuid() == 0 else Path.home() / ".cache"
    return home / "pool-managerd" / "models"


def _nearest(path: Path) -> Path:
    return next((one for one in (path, *path.parents) if one.exists()), path)


def _wanted(wishes: Wishes) -> PoolConfig:
    """The pool, but for what only its model's header tells. Raises CommandFailed for a file that is not there."""
    if not wishes.ref.strip():
        raise CommandFailed("cannot run it: REF is empty", USAGE, hint="name a file, or hf:ORG/REPO:QUANTISATION")
    ref = wishes.ref if _NAMED.match(wishes.ref) else f"file:{Path(wishes.ref.removeprefix('file:')).absolute()}"
    engine = "vllm" if _is_folder(ref) else "llamacpp"
    try:
        return PoolConfig.model_validate({
            "id": wishes.pool_id or name_of(ref), "engine": engine, "model": ref, "ctx": wishes.ctx, "slots": wishes.slots,
            "devices": wishes.devices, "preload": False, "provisioning": _engine(engine),
        })  # fmt: skip
    except ValidationError as problem:
        first = problem.errors()[0]
        why = str(first["msg"]).removeprefix("Value error, ")
        raise CommandFailed(f"cannot use --{first['loc'][0]}: {why}", USAGE) from problem


def _is_folder(ref: str) -> bool:
    """Raises CommandFailed for a file that is not there."""
    if ref.startswith("file:"):
        path = Path(ref.removeprefix("file:"))
        if not path.exists():
            raise CommandFailed(f"cannot run {path}: there is no such file", USAGE, hint="of a hub write hf:ORG/REPO/FILE.gguf")
        return path.is_dir()
    return _FOR_VLLM.fullmatch(ref.rstrip("/")) is not None


def _engine(engine: str) -> dict[str, Any]:
    """How this machine has it. Raises CommandFailed where it has none."""
    kind = ENGINES[engine]
    if kind.package is not None and importlib.util.find_spec(kind.package) is not None:
        return {"mode": "package"}
    program = "llama-server" if engine == "llamacpp" else engine
    found = shutil.which(program)
    if found is None:
        raise CommandFailed(
            f"cannot run it: {engine} is not installed", NO,
            hint=kind.install or f"install {engine}, so that {program} is on PATH; llama.cpp runs GGUF files: hf:ORG/REPO:Q4_K_M",
        )  # fmt: skip
    return {"mode": "binary", "binary": {"path": found}}


def name_of(ref: str) -> str:
    """A pool's id from what the model is called."""
    path = ref.partition(":")[2].rstrip("/").partition("?")[0]
    if ref.lower().startswith("hf:") and path.count("/") < 2:
        path = re.split("[:@]", path)[0]
    name = path.rpartition("/")[2]
    name = _PART.sub("", re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)).removesuffix("-GGUF").removesuffix("-gguf")
    return re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", name.lower()).strip("-._")[:63] or "model"


# --- what is done ---


async def _run(config: Config, wanted: PoolConfig, wishes: Wishes, screen: Screen) -> int:
    stopping = Signals()
    with stopping.installed():
        async with serving(config, os.environ, screen.event) as served:
            work = asyncio.create_task(_steps(served, wanted, wishes, screen))
            stop = asyncio.create_task(stopping.first.wait())
            try:
                await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
                screen.step("Stopping; what was fetched is kept", mark="!")
                return OK if served.node.pool_ids() and served.node.status(wanted.id)["ready"] else NO
            finally:
                for task in (work, stop):
                    task.cancel()
                with contextlib.suppress(asyncio.CancelledError, PoolError):
                    await work
                await stop_node(served.node, stopping)


async def _steps(served: Served, wanted: PoolConfig, wishes: Wishes, screen: Screen) -> int:
    node = served.node
    found = await node.propose(wanted)
    _tell(found, screen)
    if wishes.dry_run:
        return OK
    async with open_gateway(
        node, wishes.bind or free_address()
    ) as url:  # first: a port that is taken is known before anything is fetched
        await (await node.apply(node.config.model_copy(update={"pools": (found.pool,)}))).wait()
        await _started(served, found.pool.id, screen)
        if wishes.message is not None:
            async with aiohttp.ClientSession() as session:
                await ask(session, url, wishes.message, _say, found.pool.id, tokens=found.pool.ctx or USUAL_TOKENS, indent="")
            _say("\n")
            return OK
        _how_to_ask(url, found.pool.id, screen)
        await asyncio.get_running_loop().create_future()  # until it is asked to stop
    return OK


def _tell(found: Proposal, screen: Screen) -> None:
    pool = found.pool
    if found.fetched:
        screen.step(f"{pool.model}: {found.fetched} to fetch")
    split = ", divided" if pool.tensor_split is not None else ""
    screen.step(f"It fits with {pool.ctx} tokens of context for {count(pool.slots, 'slot')}: {found.where}{split}")
    for part in found.needs:
        screen.text(f"             {part}\n")
    keys = {"id": pool.id, "engine": pool.engine, "model": f'"{pool.model}"', "ctx": pool.ctx, "slots": pool.slots}
    more = {"tensor_split": pool.tensor_split} if pool.tensor_split is not None else {}
    line = ", ".join(f"{key}: {value}" for key, value in (keys | more).items())
    screen.text(f"             in a configuration file: pools: [{{{line}}}]\n")


async def _started(served: Served, pool_id: str, screen: Screen) -> None:
    """Once it is ready. Raises PoolError."""
    operation = await served.node.start(pool_id)
    ended = asyncio.create_task(operation.wait())
    tenth = -1
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=_LOOK_S)
            now = served.node.status(pool_id)["preload"] or {}
            done, total = now.get("bytes_done") or 0, now.get("bytes_total") or 0
            if now.get("step") == "fetch" and total and done * 10 // total > tenth:
                tenth = done * 10 // total
                screen.step(f"Fetched {size(done)} of {size(total)}")
        await ended
    finally:
        ended.cancel()


def free_address() -> str:
    """The usual one, unless somebody has it: a daemon's gateway, another such command."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", USUAL_PORT))
        except OSError:
            return "127.0.0.1:0"
    return f"127.0.0.1:{USUAL_PORT}"


def _say(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _how_to_ask(url: str, pool_id: str, screen: Screen) -> None:
    question = f'{{"model":"{pool_id}","messages":[{{"role":"user","content":"Tell me a joke"}}]}}'
    screen.title(f"Ready: {url}/v1, model '{pool_id}'. Ctrl-C ends it.")
    screen.text(
        f"  {program()} chat {pool_id} --url {url}\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{question}'\n"
    )
