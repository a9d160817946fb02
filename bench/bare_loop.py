"""What a restart costs in Python at the least: a loop that starts each program of a file again when it ends, nothing more."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def keep(loop: asyncio.AbstractEventLoop, argv: Sequence[str], children: dict[int, subprocess.Popen[bytes]]) -> None:
    """Run ``argv`` now, and again whenever it ends."""
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pidfd = os.pidfd_open(child.pid)
    children[pidfd] = child

    def ended() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        children.pop(pidfd).wait()
        keep(loop, argv, children)

    loop.add_reader(pidfd, ended)


async def main(programs: Sequence[Sequence[str]]) -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    children: dict[int, subprocess.Popen[bytes]] = {}
    loop.add_signal_handler(signal.SIGTERM, over.set)
    for argv in programs:
        keep(loop, argv, children)
    await over.wait()
    for pidfd, child in children.items():
        loop.remove_reader(pidfd)
        child.kill()
        child.wait()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
