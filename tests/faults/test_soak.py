"""Twenty seconds of what ``make soak`` does for half an hour."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.conftest import ALL
from tests.faults.soak import Soak


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(os.environ.get(ALL) != "all", reason="takes a minute: make faults")
def test_what_the_daemon_holds_does_not_grow(open_dir: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    report = Soak(open_dir / "d", seed).run(20)
    assert not report.broken, f"seed {seed}: {report}"
    assert report.requests > 100
