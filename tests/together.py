"""``make test``: all tests, in two processes at once: most of them wait for other processes, not for this machine.

Arguments go to both. The second one's output is shown when the first has ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tests.conftest import REPOSITORY

WAITING = ("tests/system", "tests/gpu")
"""What takes as long as all the rest, most of it in waiting for daemons."""


def main(arguments: Sequence[str]) -> int:
    """The exit code of the one that failed, if one has."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    rest = [f"--ignore={folder}" for folder in WAITING]
    with tempfile.TemporaryFile() as said:
        other = subprocess.Popen(
            [*command, "-o", "cache_dir=.pytest_cache/waiting", *WAITING], cwd=REPOSITORY, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            first = subprocess.run([*command, *rest, "tests"], cwd=REPOSITORY, check=False).returncode
            second = other.wait()
        except BaseException:
            other.terminate()
            other.wait()
            raise
        said.seek(0)
        sys.stdout.buffer.write(said.read())
        sys.stdout.flush()
    return first or second


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
