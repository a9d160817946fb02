"""A failing run made small: fewer actions, and the same rule is still broken.

Each try is a whole run, so that what is left really fails. Halves are left out first, then quarters, down to single actions.
"""

from __future__ import annotations

from pool_managerd.testing.world import Outcome, run

MAX_RUNS = 300


def shrink(failed: Outcome, max_runs: int = MAX_RUNS) -> tuple[Outcome, frozenset[int]]:
    """The smallest run that was found, and which actions are left out of it. ``failed`` has broken a rule."""
    if failed.broken is None:
        raise ValueError("cannot shrink a run that has broken no rule")
    rule, best = failed.broken.rule, failed
    kept = [action.index for action in failed.scenario.actions]
    everything = frozenset(kept)
    size, runs = (len(kept) + 1) // 2, 0
    while size and runs < max_runs:
        smaller = False
        for start in range(0, len(kept), size):
            tried = kept[:start] + kept[start + size :]
            runs += 1
            outcome = run(failed.scenario, everything - frozenset(tried))
            if outcome.broken is not None and outcome.broken.rule == rule:
                best, kept, smaller = outcome, tried, True
                break
            if runs >= max_runs:
                break
        if not smaller:
            size = size // 2 if size > 1 else 0
        size = min(size, len(kept))
    return best, everything - frozenset(kept)
