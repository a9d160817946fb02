"""``python -m bench [name…] [--quick] [--json FILE]``: measure, print one table."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from bench import (
    acquire,
    adopt,
    apply,
    cold_start,
    conversation,
    crash_loop,
    daemon_start,
    gateway,
    gpus,
    idle,
    leases,
    machine,
    memory,
    models,
    ready_again,
    reload,
    restart,
    swap,
)
from bench.fleet import Settings
from bench.processes import sweep
from bench.result import NotInstalledError, Row, not_measured, show

ROWS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "restart": restart.measure,
    "ready": ready_again.measure,
    "crashes": crash_loop.measure,
    "memory": memory.measure,
    "models": models.measure,
    "idle": idle.measure,
    "cold": cold_start.measure,
    "conversation": conversation.measure,
    "acquire": acquire.measure,
    "start": daemon_start.measure,
    "leases": leases.measure,
    "adopt": adopt.measure,
    "apply": apply.measure,
    "gateway": gateway.measure,
    "swap": swap.measure,
    "gpus": gpus.measure,
    "reload": reload.measure,
}
_PATIENCE_S = 180.0


def main(argv: list[str]) -> int:
    """Exit code: 0 when every measured goal was reached, 1 when one was missed, 2 when a row broke."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure what the documentation promises.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"which: {', '.join(ROWS)}; without one, all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no waiting for a quiet machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    chosen = parser.parse_args(argv)
    unknown = sorted(set(chosen.names) - ROWS.keys())
    if unknown:
        parser.error(f"cannot measure {', '.join(unknown)}: there are {', '.join(ROWS)}")
    signal.signal(signal.SIGTERM, _stop)
    rows, broken = _measure(chosen.names or list(ROWS), quick=chosen.quick)
    print(machine.describe())
    show(rows)
    if chosen.json:
        content = {"machine": machine.describe(), "quick": chosen.quick, "rows": [row.to_dict() for row in rows]}
        chosen.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return 2 if broken else int(any(row.reached is False for row in rows))


def _measure(names: list[str], *, quick: bool) -> tuple[list[Row], bool]:
    quiet = machine.Quiet(0.0 if quick else _PATIENCE_S)
    rows: list[Row] = []
    broken = False
    directory = Path(tempfile.mkdtemp(prefix="pool-managerd-bench-"))
    directory.chmod(0o755)
    try:
        for name in names:
            load = quiet.wait()
            print(f"{name} (load {load:.2f}) ...", file=sys.stderr, flush=True)
            try:
                rows += ROWS[name](Settings(directory, quick))
            except NotInstalledError as missing:
                rows.append(not_measured(name, str(missing)))
            except Exception as problem:  # noqa: BLE001 - the boundary of a row: the others are measured all the same
                broken = True
                rows.append(Row(name, note=f"broken: {problem!r}"))
            for left in sweep(directory):
                broken = True
                print(f"cannot go on without ending what {name} left behind: {left}", file=sys.stderr)
    finally:
        sweep(directory)
        shutil.rmtree(directory, ignore_errors=True)
    return rows, broken


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt  # so that every block that has started something ends it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
