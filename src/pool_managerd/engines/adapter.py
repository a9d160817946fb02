"""What is to be written to run one more engine: an adapter, beside its line in `core.engines`.

The module that is named like the engine has an ``ADAPTER``: a class that is made with a `Host`, once per node. It answers
four questions: how is this pool run (`Adapter.recipe`), what is wrong with it (`Adapter.problems`), what decides the memory of
a command line that somebody else wrote (`Adapter.memory_of`), and how does it save what is in its slots, if it can
(`Adapter.dialect`). Everything else about an engine is data in its line.

A recipe is made once per start, before the GPUs and the port are known: what it says of memory decides which GPUs those are.
Whatever can be wrong with a pool is found while it is made, so that nothing is reserved for one that cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from pool_managerd.config import Config, PolicyConfig, PoolConfig
from pool_managerd.core.artifacts import ResolvedModel, Warmup
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.memory.estimate import DeviceFraction, EngineSettings
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.core.slot_cache import SlotSaving
from pool_managerd.core.slot_dialect import SlotDialect
from pool_managerd.engines.programs import ProgramProbe
from pool_managerd.errors import PoolError, SpecError


@dataclass(frozen=True, slots=True)
class Host:
    """What adapters may use of the node. ``shape_of`` reads a GGUF model's header, or refuses it (a PoolError); ``has_gpu``
    tells whether this machine shows a GPU at all; ``policy`` is the one in force.
    """

    config: Config
    probe: ProgramProbe
    shape_of: Callable[[str], ModelShape | None]
    has_gpu: Callable[[], bool]
    policy: Callable[[], PolicyConfig]


@dataclass(frozen=True, slots=True)
class Program:
    """What is put before the flags, and what it calls itself."""

    argv: tuple[str, ...]
    version: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LaunchMemory:
    """What decides a launch's memory, and the files that it loads beside the model: whole ones, and a draft model."""

    settings: EngineSettings | DeviceFraction
    files: tuple[str, ...] = ()
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """One launch, checked: all of it but its GPUs and its port, which ``flags`` adds.

    ``flags`` may raise a NodeError for GPUs that do not do. ``warmup`` is the first request, which it can answer. ``slots`` is
    how the caches of its slots are kept from one launch to the next; None where they are not.
    """

    program: Program
    env: dict[str, str]
    flags: Callable[[Allocation | None, int], tuple[str, ...]]
    memory: LaunchMemory
    warmup: Warmup = "completion"
    slots: SlotSaving | None = None


class Adapter(Protocol):
    """One engine. Everything here blocks; modes are those of the engine's line, ``external`` apart."""

    def recipe(self, pool: PoolConfig, mode: str, model: ResolvedModel) -> Recipe:
        """How to run ``pool`` on ``model``; the same input gives the same answer. Raises SpecError for what the configuration
        must change, EngineError (``preload failed: …``) for a program that cannot be run.
        """
        ...

    def problems(self, pool: PoolConfig, mode: str, model_path: str | None) -> tuple[PoolError, ...]:
        """All for which ``recipe`` would be refused, at once; of the model, if it is known where it lies. Starts no engine."""
        ...

    @property
    def dialect(self) -> SlotDialect | None:
        """How the engine saves the caches of its slots; None for one that cannot."""
        ...

    def memory_of(self, flags: Sequence[str], version: str) -> LaunchMemory:
        """What decides the memory of a command line that is run as it stands; what cannot be read there is the default."""
        ...


def adapter_of(engine: str, host: Host) -> Adapter:
    """A new adapter of an engine that can be run here. Raises SpecError for one that has a line in `ENGINES` and no more."""
    name = f"pool_managerd.engines.{engine}"
    try:
        adapter: Adapter = import_module(name).ADAPTER(host)
    except ModuleNotFoundError as problem:
        if problem.name != name:
            raise
        raise SpecError(
            f"cannot run {engine}: it has no adapter", hint=f"write engines/{engine}.py with an ADAPTER, or attach to it"
        ) from problem
    return adapter
