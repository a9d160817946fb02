"""Whether simulated runs find what is wrong with downloads: each mutant is found by a seed that finds nothing else."""

from __future__ import annotations

import pytest

from pool_managerd.supervision.fetching import FetchProgress
from pool_managerd.supervision.launch_work import LaunchWork
from pool_managerd.testing.scenario import draw
from pool_managerd.testing.world import run

stage = LaunchWork.stage


def silent(self: FetchProgress, done: int, total: int) -> None:
    """What comes is shown, and the pool is not told of it."""
    self._actor.learn(self._epoch, step=self._step, progress=(done, total), rate=0.0)


async def greedy(self: LaunchWork, epoch: int, *, queue: bool) -> None:
    """Memory is reserved first."""
    await self._admit(epoch)
    await stage(self, epoch, queue=queue)


@pytest.mark.parametrize(
    ("rule", "where", "name", "mutant", "seed"),
    [
        ("a start that fetches is not late as long as bytes come", FetchProgress, "__call__", silent, 94),
        ("a download keeps no memory from others", LaunchWork, "stage", greedy, 11),
    ],
)
def test_a_download_that_breaks_a_rule_is_found(
    rule: str, where: type, name: str, mutant: object, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run(draw(seed))
    assert outcome.broken is None and any(" fetch: " in line for line in outcome.lines())
    monkeypatch.setattr(where, name, mutant)
    broken = run(draw(seed)).broken
    assert broken is not None, "are scenarios drawn in another way now? take a seed that finds it"
    assert broken.rule == rule
