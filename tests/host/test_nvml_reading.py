"""A scan during which the GPUs change, through the real binding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pool_managerd.host.simulation import simulated_environment
from tests.conftest import REPOSITORY
from tests.host.simulated import eight_80, gpu_uuid, topology

SCAN_AND_CHANGE = """
import json, os, pathlib, sys
import pynvml
from pool_managerd.host.nvml_reading import NvmlReader

def change_behind_the_first(handle, uuid, pci):
    file = pathlib.Path(os.environ[sys.argv[1]])
    file.with_name("scratch").write_text(sys.argv[2])
    file.with_name("scratch").replace(file)

pynvml.nvmlInit()
print(json.dumps(NvmlReader(pynvml, change_behind_the_first).scan()["devices"]))
"""
WITHOUT_ONE = eight_80() + "fault gpu=3 gone\n"
BACKWARDS = (7, 6, 5, 4, 3, 2, 1, 0)


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        (eight_80(), WITHOUT_ONE, [0, 1, 2, 4, 5, 6, 7]),
        (eight_80(), eight_80() + "fault gpu=0 gone\n", [1, 2, 3, 4, 5, 6, 7]),
        (WITHOUT_ONE, eight_80(), list(range(8))),
        (eight_80(), eight_80(BACKWARDS), list(BACKWARDS)),
    ],
    ids=["one-goes", "the-first-goes", "one-comes", "another-order"],
)
def test_gpus_that_change_while_they_are_read_are_read_again(
    tmp_path: Path, simulated_driver: Path, before: str, after: str, left: list[int]
) -> None:
    variables = simulated_environment(simulated_driver, topology(tmp_path / "gpus", before))
    (name,) = (name for name, value in variables.items() if value.endswith("gpus"))
    done = subprocess.run(
        [sys.executable, "-c", SCAN_AND_CHANGE, name, after], capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, **variables, "PYTHONPATH": str(REPOSITORY / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [device.get("uuid") for device in found] == [gpu_uuid(number) for number in left]
    assert not [device["error"] for device in found if "error" in device], "none of them is lost"
