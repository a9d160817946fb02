"""``make test``: all tests, in three processes at once: most of them wait for other processes, not for this machine.

Arguments go to all. The others' output is shown when the first has ended.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.conftest import REPOSITORY

APART = (("tests/system",), ("tests/gpu", "tests/cli", "tests/faults"))
"""Each of these groups takes about as long as all the rest, much of it in waiting for daemons."""


def main(arguments: Sequence[str]) -> int:
    """The exit code of the first that failed, if one has."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    rest = [f"--ignore={folder}" for folders in APART for folder in folders]
    with contextlib.ExitStack() as stack:
        others = [_begin(stack, command, folders) for folders in APART]
        codes = [subprocess.run([*command, *rest, "tests"], cwd=REPOSITORY, check=False).returncode]
        for process, said in others:
            codes.append(process.wait())
            said.seek(0)
            sys.stdout.buffer.write(said.read())
            sys.stdout.flush()
    return next((code for code in codes if code), 0)


def _begin(
    stack: contextlib.ExitStack, command: Sequence[str], folders: Sequence[str]
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """One process, which ends with ``stack``, and what it prints."""
    said = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    cache = f"cache_dir=.pytest_cache/{Path(folders[0]).name}"
    process = subprocess.Popen([*command, "-o", cache, *folders], cwd=REPOSITORY, stdout=said, stderr=subprocess.STDOUT)
    stack.callback(_end, process)
    return process, said


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
