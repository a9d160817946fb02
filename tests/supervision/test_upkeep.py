"""The node's own tasks are begun again when they fail, and the node is given up on when that does not help."""

from __future__ import annotations

import asyncio

import pytest

from pool_managerd.supervision.upkeep import MAX_FAILURES, keep_up
from pool_managerd.testing.fake_parts import FakeNode
from pool_managerd.testing.manual_clock import settle


async def test_a_task_that_fails_is_begun_again_and_told_and_one_that_ends_is_done() -> None:
    node, begun = FakeNode(), 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise ValueError("a fault of our own")

    task = asyncio.create_task(keep_up(work, "the watch of the GPUs", node.clock, node.events, node.fatal.append))
    for _ in range(3):
        await settle()
        await node.clock.advance(5)
    assert begun == 3 and not node.fatal and task.done()
    told = [event for event in node.told if event.type == "internal_error"]
    assert len(told) == 2 and all("a fault of our own" in event.human for event in told)
    assert all(event.level == "critical" and "the watch of the GPUs" in event.human for event in told)


@pytest.mark.parametrize(("runs_s", "ends"), [(0, True), (700, False)])
async def test_one_that_fails_often_ends_the_daemon_and_one_that_fails_seldom_does_not(runs_s: float, ends: bool) -> None:
    node = FakeNode()

    async def work() -> None:
        over = asyncio.Event()
        node.clock.call_at(node.clock.monotonic() + runs_s, over.set)
        await over.wait()
        raise ValueError("again")

    task = asyncio.create_task(keep_up(work, "it", node.clock, node.events, node.fatal.append))
    for _ in range(3 * MAX_FAILURES):
        await settle()
        await node.clock.advance(400)
    failures = [event for event in node.told if event.type == "internal_error"]
    assert bool(node.fatal) is ends and len(failures) >= MAX_FAILURES
    task.cancel()
