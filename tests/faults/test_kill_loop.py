"""A few turns of the loop that ``make faults`` runs for longer."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.kill_loop import run


def test_what_was_acknowledged_is_so_after_any_death(open_dir: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    report = run(open_dir / "d", kills=8, seed=seed)
    assert not report.broken, f"seed {seed}: {report}: {report.broken}"
    assert report.acknowledged > 20 and report.adoptions > 0, str(report)
