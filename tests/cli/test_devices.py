"""``devices`` against a real server on loopback, and the picture it draws."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.cli.picture import cells, draw, parts_of
from tests.api.fake_devices import MIB, UUID_0, busy_device, device, gone_device, lost_device
from tests.cli.test_commands import Invoke, Server

WIDTH = 80
BUSY = """\
GPU 0  NVIDIA GeForce RTX 4090  ok  61 °C  287 W  98 % busy  driver 570.86.15
  [AAAAAAAAAAAAAAAAAAAAAAAAAaaaaaabbbbbbbbbbbbb111==...........................]
  A  pool demo           8,192 MiB  of 10,240 reserved; pid 4242
  B  pool late               0 MiB  of 4,096 reserved
  1  python3 (pid 999)   1,024 MiB  not ours
  =  driver                500 MiB
  .  free               14,848 MiB  of 24,564 MiB; 8,704 MiB not reserved
"""


def picture(row: dict[str, Any], width: int = WIDTH) -> str:
    return "".join(f"{line}\n" for line in draw(row, "570.86.15", width))


def test_a_gpu_is_a_header_a_bar_and_a_legend_with_exact_sizes() -> None:
    assert picture(busy_device()) == BUSY


def test_a_quarantined_gpu_shows_why_and_what_to_do_and_every_line_fits() -> None:
    row = busy_device(state="quarantined", reason="It fell off the bus (Xid 79)", remedy="nvidia-smi --gpu-reset -i 0")
    lines = picture(row).splitlines()
    assert "quarantined" in lines[0]
    assert lines[1:4] == [
        f"  {UUID_0} at 00000000:01:00.0", "  It fell off the bus (Xid 79)", "  remedy: nvidia-smi --gpu-reset -i 0"
    ]  # fmt: skip
    assert max(map(len, lines)) <= WIDTH


def test_a_mig_instance_is_named_by_its_uuid_and_its_parent() -> None:
    uuid = "MIG-c7384736-a75d-5afc-978f-d2f1294409fd"
    head = picture(device(1, device=uuid, uuid=uuid, parent_uuid="GPU-1", name="NVIDIA A100-SXM4-80GB MIG 1g.10gb")).splitlines()[
        0
    ]
    assert head.startswith(uuid)
    assert "MIG of GPU 1" in head
    assert len(head) <= WIDTH


def test_a_gpu_that_is_gone_has_no_memory_to_draw() -> None:
    assert picture(gone_device(device="1")).splitlines() == [
        "GPU 1  gone  quarantined  driver 570.86.15", "  GPU-gone", "  it is lost: it is no longer there",
        "  remedy: reboot the machine",
    ]  # fmt: skip
    moved = picture(gone_device(device="GPU-gone")).splitlines()
    assert moved[:2] == ["GPU-gone  gone  quarantined  driver 570.86.15", "  it is lost: it is no longer there"]


def test_of_a_gpu_that_cannot_be_read_only_the_promises_are_drawn() -> None:
    row = lost_device()
    assert sum(part.size_bytes for part in parts_of(row)) == row["vram_total_bytes"]
    lines = picture(row).splitlines()
    assert lines[0] == "GPU 0  NVIDIA GeForce RTX 4090  quarantined  driver 570.86.15"
    assert re.fullmatch(r"  \[a+\?+\]", lines[4])
    assert lines[5:] == [
        "  A  pool demo  10,240 MiB  reserved; not seen in use",
        "  ?  not known       - MiB  of 24,564 MiB: the device cannot be read",
    ]  # fmt: skip


def test_memory_that_is_kept_for_an_exclusive_pool_is_not_offered() -> None:
    text = picture(device(vram_available_bytes=0, kept_for="picky"))
    assert "  .  free    24,064 MiB  of 24,564 MiB; kept for pool picky\n" in text


def test_an_engine_whose_pid_cannot_be_matched_is_not_drawn_as_a_strangers() -> None:
    unmatched = [
        {"pid": 70, "name": None, "kind": "compute", "vram_bytes": 8_192 * MIB, "certain": False},
        {"pid": 71, "name": None, "kind": "compute", "vram_bytes": 1_024 * MIB, "certain": False},
    ]
    row = busy_device(foreign=unmatched)
    assert sum(part.size_bytes for part in parts_of(row)) == row["vram_total_bytes"]
    text = picture(row)
    assert "pid 70" not in text
    assert "a process (pid 71)   1,024 MiB  not ours; the pid is the driver's own number" in text


def test_use_beyond_the_promise_and_memory_of_nobody_known_are_said() -> None:
    row = busy_device(foreign_bytes=1_500 * MIB)
    row["reservations"][0] |= {"used_bytes": 11_000 * MIB, "exclusive": True, "pids": [1, 2, 3, 4, 5]}
    row["foreign"].append({"pid": 7, "name": None, "kind": "graphics", "vram_bytes": None, "certain": False})
    assert all(part.size_bytes >= 0 for part in parts_of(row))
    text = picture(row)
    assert "11,000 MiB  of 10,240 reserved; 760 MiB over; exclusive; pid 1, 2, 3, 4, …" in text
    assert re.search(r"a process \(pid 7\) +- MiB  not ours; the pid is the driver.s own number", text)
    assert re.search(r"\?  others +476 MiB  the driver does not say who", text)


def test_use_that_was_not_measured_is_drawn_as_a_promise() -> None:
    row = busy_device()
    row["reservations"][0]["used_bytes"] = None
    text = picture(row)
    assert "A  pool demo          10,240 MiB  reserved; the driver does not say what is used" in text
    assert "[aaaa" in text
    row["reservations"][0]["pids"] = []
    assert "A  pool demo          10,240 MiB  reserved; not seen in use" in picture(row)


def test_more_holders_than_letters_share_the_last_one() -> None:
    many = [{"pool_id": f"p{n}", "reserved_bytes": MIB, "used_bytes": 0, "exclusive": False, "pids": []} for n in range(40)]
    text = picture(device(reservations=many), 120)
    assert text.count("\n  Z  pool p") == 15


def test_names_from_elsewhere_cannot_steer_the_terminal() -> None:
    row = busy_device(reason="bad\x1b[2J\nthing", name="x\x1b]0;y")
    row["foreign"][0]["name"] = "evil\r\n\x1b[31m"
    text = picture(row)
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(text.splitlines()) == len(BUSY.splitlines()) + 1


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12), st.integers(12, 200))
def test_a_bar_is_as_wide_as_asked_and_shows_all_that_is_there(sizes: list[int], width: int) -> None:
    counts = cells(sizes, width)
    assert sum(counts) == (width if any(sizes) else 0)
    assert [count > 0 for count in counts] == [size > 0 for size in sizes]


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=6))
def test_a_bar_is_in_proportion(sizes: list[int]) -> None:
    counts, total = cells(sizes, 10_000), sum(sizes)
    assert all(abs(count - size * 10_000 / total) <= len(sizes) for count, size in zip(counts, sizes, strict=True))


def test_the_parts_add_up_to_the_whole_memory() -> None:
    for row in (busy_device(), device(), busy_device(foreign_bytes=2_000 * MIB)):
        assert sum(part.size_bytes for part in parts_of(row)) == row["vram_total_bytes"]


def test_the_command_shows_every_gpu_and_the_answer_itself_for_machines(invoke: Invoke, server: Server) -> None:
    code, out, _ = invoke("devices")
    assert code == 0
    assert out.startswith(BUSY + "\nGPU 1  ")
    code, out, _ = invoke("devices", "-o", "json")
    assert (code, json.loads(out)) == (0, server.node.devices())


def test_stale_figures_say_how_old_they_are_and_why(invoke: Invoke, server: Server) -> None:
    problem = {"code": "nvml_hung", "message": "cannot read the GPUs: NVML hangs", "hint": "look at dmesg"}
    server.node.answer |= {"stale": True, "age_ms": 42_000, "problem": problem, "simulated": True}
    lines = invoke("devices")[1].splitlines()
    assert lines[:3] == [
        "These GPUs are simulated.",
        "Stale, last read 42 s ago: cannot read the GPUs: NVML hangs",
        "hint: look at dmesg",
    ]
    server.node.answer |= {"devices": [], "age_ms": None}
    lines = invoke("devices")[1].splitlines()
    assert lines[1:] == ["cannot read the GPUs: NVML hangs", "hint: look at dmesg", "no GPU is known"]


def test_no_gpu_is_an_answer(invoke: Invoke, server: Server) -> None:
    server.node.answer |= {"devices": []}
    assert invoke("devices")[:2] == (0, "no GPU was found\n")


def test_a_device_is_cordoned_and_uncordoned(invoke: Invoke, server: Server) -> None:
    assert invoke("devices", "cordon", "1")[:2] == (0, "device 1 (NVIDIA GeForce RTX 4090): ok, cordoned\n")
    assert "ok, cordoned" in invoke("devices")[1]
    code, out, _ = invoke("devices", "uncordon", "1", "-o", "json")
    assert (code, json.loads(out)["cordoned"]) == (0, False)
    assert server.node.device_calls == [("cordon", "1"), ("uncordon", "1")]


@pytest.mark.parametrize("wanted", ["9", "../../etc/passwd", "MIG-GPU-1/2/3"])
def test_an_unknown_device_is_refused(invoke: Invoke, wanted: str) -> None:
    code, _, err = invoke("devices", "cordon", wanted)
    assert code == 4
    assert err.startswith(f"device {wanted} not found")


def test_nvml_is_let_go_and_taken_up_again(invoke: Invoke, server: Server) -> None:
    out = invoke("devices", "release")[1]
    assert out.startswith("The engines of 2 pools still use the driver.\nhint: pool-managerd drain demo late\n")
    assert "they were let go\nhint: pool-managerd devices resume\n" in out
    server.node.answer |= {"devices": [device()]}
    assert invoke("devices", "release")[1].startswith("Stale, last read")
    server.node.device_calls.clear()
    invoke("devices", "release")
    code, out, _ = invoke("devices", "resume", "-o", "json")
    assert (code, json.loads(out)["stale"]) == (0, False)
    assert [call for call, _ in server.node.device_calls] == ["release", "resume"]


@pytest.mark.parametrize(
    "words", [("devices", "cordon", ""), ("devices", "uncordon", " "), ("status", ""), ("logs", ""), ("start", "")]
)
def test_an_empty_id_is_a_usage_error(invoke: Invoke, words: tuple[str, ...]) -> None:
    code, _, err = invoke(*words)
    assert (code, err.splitlines()[0]) == (2, "cannot use an empty ID")


def test_an_unreachable_daemon_is_a_3(invoke: Invoke) -> None:
    assert invoke("devices", "--url", "http://127.0.0.1:1")[0] == 3


@pytest.mark.parametrize("dumb", [False, True])
def test_on_a_terminal_the_lines_are_the_same_with_and_without_colours(
    invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch, dumb: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1" if dumb else "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = invoke("devices")[1]
    assert re.sub(r"\x1b\[[0-9;]*m", "", out).startswith(BUSY)
    assert bool(re.search(r"\x1b\[3[0-9]m", out)) is not dumb
