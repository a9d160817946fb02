"""What each pool's start would refuse, asked of models and engines before anything is started."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import NOT_FETCHED, PreparedEngine
from pool_managerd.engines.modes import mode_of
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.programs import Run
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import PoolError
from pool_managerd.host.facts import FOLDER_TIMEOUT_S
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.runtime.confined import ConfinedRun
from pool_managerd.runtime.engine_users import EngineUsers, UserRules, usual_user
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.isolation import require_reach
from pool_managerd.wiring.elsewhere import elsewhere_of

ASK_AT_ONCE = 8
ENGINE_TIMEOUT_S = 120.0
"""The first time that vLLM lists its flags it reads gigabytes of Python and libraries: a minute and more from a slow disk."""
TOLD_AFTER_S = 5.0
Tell = Callable[[str], None]


class Setups:
    """What each pool's start would refuse before it asks for any GPU, all of it at once. No engine is started, and no model is
    read beyond its header.

    A pool whose disk does not answer is not asked again while it is still being asked. Without ``engines`` only the models'
    files are looked for. ``model_bytes`` are their sizes by pool, as far as they were found. ``tell`` gets a sentence where
    engines are waited for.
    """

    def __init__(
        self, config: Config, models: ModelProvisioner, engines: EngineProvisioner | None, tell: Tell = lambda _: None
    ) -> None:
        self._models, self._engines, self._say = models, engines, tell
        self.model_bytes: dict[str, int] = {}
        self.use_config(config)
        self._asking: dict[str, str] = {}
        self._found: dict[str, list[tuple[str, str, str]]] = {}
        self._changed = threading.Condition()

    def use_config(self, config: Config) -> None:
        """Other pools, from the next ``problems`` on."""
        self._config = config
        self._pools = [pool for pool in config.pools if mode_of(pool) != "external"]

    def problems(self) -> tuple[tuple[str, str, str], ...]:
        """Pool, message and remedy of each. Blocks, for a bounded time: disks get less of it than engines."""
        waiting: SimpleQueue[PoolConfig] = SimpleQueue()
        for pool in self._pools:
            if pool.id not in self._asking:
                self._found.pop(pool.id, None)
                waiting.put(pool)
        for _ in range(min(ASK_AT_ONCE, waiting.qsize())):
            threading.Thread(target=self._ask_all, args=(waiting,), daemon=True, name="preflight").start()
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(self._all_found, FOLDER_TIMEOUT_S)
            self._wait_for_engines(began)
        return tuple(found for pool in self._pools for found in self._found.get(pool.id) or self._unanswered(pool.id))

    def _wait_for_engines(self, began: float) -> None:
        """Those that are being asked may take their time, as long as there are any; what is waited for is said once."""
        silent = True
        while not self._all_found() and (names := [pool for pool, stage in self._asking.items() if stage == "engine"]):
            passed = time.monotonic() - began
            if passed >= ENGINE_TIMEOUT_S:
                return
            if silent and passed >= TOLD_AFTER_S:
                silent = False
                whose = f"pool {names[0]}" if len(names) == 1 else f"pools {', '.join(sorted(names))}"
                self._say(f"still asking the engine of {whose} what it knows, for {ENGINE_TIMEOUT_S:g} s at most")
            self._changed.wait((TOLD_AFTER_S if silent else ENGINE_TIMEOUT_S) - passed)

    def _all_found(self) -> bool:
        return all(pool.id in self._found for pool in self._pools)

    def _unanswered(self, pool_id: str) -> list[tuple[str, str, str]]:
        if pool_id in self._found:
            return []
        if self._asking.get(pool_id) == "engine":
            return [(pool_id, f"cannot load its engine: it gave no answer within {ENGINE_TIMEOUT_S:g} s", "")]
        return [(pool_id, "cannot look at its model and engine: the disk does not answer", "")]

    def _ask_all(self, waiting: SimpleQueue[PoolConfig]) -> None:
        with suppress(Empty):
            while True:
                pool = waiting.get_nowait()
                self._tell(pool.id, "disk")
                try:
                    found = list(dict.fromkeys(self._ask(pool)))
                except Exception as problem:  # noqa: BLE001 - the thread's boundary: whoever waits must be told
                    found = [(pool.id, f"cannot check it: an internal error: {problem!r}", "")]
                self._tell(pool.id, None, found)

    def _tell(self, pool_id: str, stage: str | None, found: list[tuple[str, str, str]] | None = None) -> None:
        with self._changed:
            if stage is None:
                self._asking.pop(pool_id, None)
            else:
                self._asking[pool_id] = stage
            if found is not None:
                self._found[pool_id] = found
            self._changed.notify_all()

    def _ask(self, pool: PoolConfig) -> Iterator[tuple[str, str, str]]:
        path, fetched = None, True
        try:
            model = self._models.check(pool.model, pool.checksums)
            path, self.model_bytes[pool.id] = model.local_path, model.size_bytes
        except PoolError as error:
            if error.code != NOT_FETCHED:
                yield pool.id, error.message, error.hint or ""
            elif (expected := self._models.expected(pool.model)) is not None:  # a start fetches it
                path, fetched, self.model_bytes[pool.id] = expected.local_path, False, expected.size_bytes
        if self._engines is None:
            return
        self._tell(pool.id, "engine")
        problems = self._engines.problems(pool, path)
        for problem in problems:
            yield pool.id, problem.message, problem.hint or ""
        if path is not None and fetched and not problems:
            try:
                self._require_reach(pool, path, self._engines.program_path(pool))
            except PoolError as error:
                yield pool.id, error.message, error.hint or ""

    def _require_reach(self, pool: PoolConfig, model: str, program: str) -> None:
        user = usual_user(user_rules(self._config))
        if user is not None:
            engine = PreparedEngine(pool.id, program, model_path=model, env=pool.provisioning.env)
            require_reach(engine, str(Path.cwd() / program), self._config.daemon.runtime_dir.absolute(), user)


def setups_of(config: Config, run: Run | None = None, *, engines: bool = True, tell: Tell = lambda _: None) -> Setups:
    """The setups of ``config`` where there is no node, whose provisioners would do. ``run`` asks binaries what they are."""
    cache, digests = ModelCache(config.model_cache), DigestCache()
    models = ModelProvisioner(config.base_dir, config.policy, cache, digests=digests)
    models.elsewhere = elsewhere_of(config, cache, digests, user_rules(config))
    ports = PortAllocator(config.daemon.engine_ports)
    found = EngineProvisioner(config, ports, check_model=models.shapes.of_gguf, run=run) if engines else None
    return Setups(config, models, found, tell)


def user_rules(config: Config) -> UserRules:
    """As whom the configuration wants engines to run."""
    low, _, high = config.daemon.engine_uids.partition("-")
    return UserRules(config.daemon.engine_user, (int(low), int(high)), config.daemon.engine_groups)


def probing(config: Config) -> ConfinedRun:
    """Runs a pool's binary to ask it what it is, where no daemon does."""
    return ConfinedRun(EngineUsers(user_rules(config), RuntimeFiles(config.daemon.runtime_dir)))
