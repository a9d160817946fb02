"""``python steps.py POOL COMMAND…``: what happens to the pool while the command runs, and when; then what that has to say."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from typing import Any

MARKS = {"error": "✗", "critical": "✗", "warn": "!"}


def main(pool_id: str, *command: str) -> int:
    """The exit code of the command."""
    last = _events(pool_id, 0)[-1]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    steps = [event for event in _events(pool_id, last["id"]) if event["level"] != "debug"]
    began = steps[0]["ts_ms"]
    for step in steps:
        mark = MARKS.get(step["level"], "·")
        sys.stdout.write(f"  {mark} {(step['ts_ms'] - began) / 1000:6.2f} s  {step['human']}\n")
    said = [line for line in done.stderr.splitlines() if not line.startswith(f"{pool_id}: ")]  # what is shown while it waits
    sys.stdout.write("\n".join([*done.stdout.splitlines(), *said]) + "\n")
    return done.returncode


def _events(pool_id: str, after: int) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection(os.environ["POOL_MANAGERD_ADDR"], timeout=10)
    connection.request("GET", f"/v1/events?after={after}&follow=false")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return [event for event in events if event.get("pool_id") == pool_id]


if __name__ == "__main__":
    main(*sys.argv[1:])
