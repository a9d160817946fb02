"""``explain --place``: which pool would take a request, by the daemon's snapshots."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.test_commands import Invoke, Server

GIB = 1 << 30


@pytest.fixture
def pools(server: Server) -> dict[str, dict[str, Any]]:
    """Three pools on two GPUs; ``demo`` has none."""

    def share(index: int) -> dict[str, Any]:
        return {"id": index, "device": str(index), "uuid": f"GPU-{index}", "vram_total_bytes": 24 * GIB}

    add = server.node.add
    add("big", vram_free_bytes=20 * GIB, devices=[share(1)], slots_free=2, ctx_max=8192, quant="Q4_K_M")
    add("small", vram_free_bytes=4 * GIB, devices=[share(0)], slots_free=1, ctx_max=2048, engine="vllm")
    add("gone", ready=False, state="backoff", last_error="exit_code=1")
    server.node.lease_ids["small"].append("l1")
    found: dict[str, dict[str, Any]] = server.node.pools
    return found


def test_the_sentence_comes_first_then_every_candidate_with_its_reason(invoke: Invoke, pools: dict[str, dict[str, Any]]) -> None:
    code, out, err = invoke("explain", "--place")
    assert (code, err) == (0, "")
    assert out == (
        "Pool 'big' takes it: 20 GiB of VRAM are free for it, and it has no active leases\n"
        "  * big    20 GiB of VRAM free for it, no leases\n"
        "  - small  4 GiB of VRAM free for it, one lease\n"
        "  - demo   no GPU, no leases\n"
        "  ! gone   it is not ready (backoff: exit_code=1)\n"
    )


@pytest.mark.parametrize(
    ("options", "winner"),
    [
        (["--engine", "vllm"], "small"),
        (["--ctx", "2049", "--avoid", "demo"], "big"),
        (["--quant", "q4_k_m"], "big"),
        (["--vram", "20GiB"], "big"),
        (["--vram", "20.001GiB"], None),
        (["--vram", "4096 mib", "--device-mask", "GPU0"], "small"),
        (["--pin", "small"], "small"),
        (["--pin", "gone"], None),
        (["--prefer", "small", "--prefer", "gone"], "small"),
        (["--prefer", "gone"], "big"),
        (["--prefer", "gone", "--no-fallback"], None),
        (["--avoid", "big"], "small"),
        (["--model", "other"], None),
    ],
)
def test_each_wish_decides(invoke: Invoke, pools: dict[str, Any], options: list[str], winner: str | None) -> None:
    code, out, _ = invoke("explain", "--place", *options, "-o", "json")
    answer = json.loads(out)
    assert (code, answer["pool_id"]) == (0 if winner else 1, winner)
    assert {c["pool_id"] for c in answer["candidates"]} == set(pools)


def test_a_fallback_and_the_wishes_are_shown_and_a_pool_that_is_not_there_is_named(invoke: Invoke, pools: Any) -> None:
    code, out, err = invoke("explain", "--place", "--prefer", "gone", "--avoid", "big", "--prefer", "typo")
    assert (code, err) == (0, "there is no pool 'typo'\n")
    assert out.splitlines()[0].startswith("Pool 'small' takes it as a fallback: ")
    assert "  - big    20 GiB of VRAM free for it, no leases; to be avoided\n  * small" in out


def test_a_device_that_no_pool_may_run_on_is_named(invoke: Invoke, pools: Any) -> None:
    code, _, err = invoke("explain", "--place", "--device-mask", "1,7,GPU-zzz")
    assert (code, err) == (0, "no pool may run on a device 7\nno pool may run on a device GPU-zzz\n")


def test_figures_that_are_not_of_now_are_said_to_be_stale(invoke: Invoke, server: Server, pools: Any) -> None:
    server.node.devices_problem = {"code": "nvml_hung", "message": "the GPU driver did not answer", "hint": ""}
    out = invoke("explain", "--place")[1]
    assert out.startswith("The metrics of the GPUs are stale, last read 17 s ago: the GPU driver did not answer\nPool 'big'")
    answer = json.loads(invoke("explain", "--place", "-o", "json")[1])
    assert (answer["devices_stale"], answer["devices_age_ms"]) == (True, 17_000)


def test_machines_are_given_the_figures_that_people_see(invoke: Invoke, pools: Any) -> None:
    answer = json.loads(invoke("explain", "--place", "--prefer", "small", "--avoid", "big", "-o", "json")[1])
    by_id = {candidate.pop("pool_id"): candidate for candidate in answer["candidates"]}
    assert by_id["small"] == {
        "objection": None, "vram_room_bytes": 4 * GIB, "vram_free_bytes": 4 * GIB, "active_leases": 1, "preferred": True,
        "avoided": False, "chosen": True,
    }  # fmt: skip
    assert by_id["big"]["avoided"] and not by_id["big"]["chosen"] and by_id["gone"]["objection"]
    assert answer["devices_stale"] is False


@pytest.mark.parametrize(
    ("problems", "shown"),
    [
        ([], "Pool 'demo' would start\n  - memory: 1 GiB on GPU 0\n"),
        (
            [{"message": "GPU 0 is cordoned", "hint": "pool-managerd devices uncordon 0", "code": "GPU_UNAVAILABLE"}],
            "Pool 'demo' would not start: GPU 0 is cordoned\n  - memory: 1 GiB on GPU 0\n"
            "  hint: pool-managerd devices uncordon 0\n",
        ),
        (
            [{"message": "it is held", "hint": "release it", "code": None}, {"message": "it is too large", "hint": None}],
            "Pool 'demo' would not start, for 2 reasons\n  - memory: 1 GiB on GPU 0\n"
            "  ! it is held\n    hint: release it\n  ! it is too large\n",
        ),
    ],
)
def test_what_stands_in_the_way_of_a_start_is_said_once_with_its_remedy(
    invoke: Invoke, server: Server, problems: list[dict[str, Any]], shown: str
) -> None:
    messages = [problem["message"] for problem in problems]
    server.node.explanation = {
        "pool_id": "demo", "steps": [{"kind": "memory", "detail": "1 GiB on GPU 0"}], "blockers": messages, "problems": problems,
        "would": "Pool 'demo' would " + (f"not start: {'; '.join(messages)}" if messages else "start"),
    }  # fmt: skip
    assert invoke("explain", "demo")[:2] == (1 if problems else 0, shown), "a start that would be refused is a no"


def test_nobody_is_an_answer_with_a_reason_for_each(invoke: Invoke, pools: Any) -> None:
    code, out, _ = invoke("explain", "--place", "--model", "other")
    assert code == 1
    assert out.startswith("No pool can take it: big: it serves tiny; ")
    assert out.count("\n  ! ") == len(pools)


def test_a_daemon_without_pools_takes_nothing(invoke: Invoke, server: Server) -> None:
    server.node.pools.clear()
    assert invoke("explain", "--place")[:2] == (1, "There is no pool\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vram", "4GB"], "cannot use --vram: '4GB' is no size"),
        (["--vram", "4"], "cannot use --vram: '4' is no size"),
        (["--vram", "-1GiB"], "cannot use --vram: '-1GiB' is no size"),
        (["--vram", "9" * 400 + "GiB"], "cannot use --vram: '9999"),
        (["--device-mask", "0,,1"], "cannot use the device mask '0,,1': it has an empty part"),
        (["--device-mask", "-1"], "cannot use the device mask '-1': -1 is negative"),
        (["demo"], "cannot place a request and explain one pool at once"),
        (["--prefer", "a", "--avoid", "a"], "cannot prefer and avoid pool 'a' at once"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_daemon_is_asked(invoke: Invoke, options: list[str], message: str) -> None:
    code, out, err = invoke("explain", "--place", *options, "--url", "http://127.0.0.1:1")
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert "\nhint: " in err


def test_a_wish_without_place_is_refused_rather_than_ignored(invoke: Invoke) -> None:
    code, _, err = invoke("explain", "demo", "--vram", "4GiB")
    assert (code, err) == (2, "cannot use --vram: it only means something with --place\nhint: add --place\n")


def test_an_answer_that_is_no_snapshot_is_refused(invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: tuple[Any, ...] = ({"pools": 3}, {"pools": [{"state": "ready"}]}, {"pools": ["x"]}, [], {})
    for answer in answers:
        monkeypatch.setattr(server.node, "snapshots", lambda answer=answer: answer)
        assert invoke("explain", "--place")[0] == 4, answer


def test_names_from_elsewhere_cannot_steer_the_terminal(invoke: Invoke, server: Server) -> None:
    server.node.add("evil", ready=False, state="failed", last_error="bad\x1b[2J")
    assert "\x1b" not in invoke("explain", "--place")[1]
