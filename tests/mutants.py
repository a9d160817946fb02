"""``make mutants``: the code of ``core/`` with one small change at a time; tests/core should notice each.

mutmut makes the mutants, finds out which tests run through which function, and runs those. Strings are left as they are: of
what is said the tests ask little. A mutant that was noticed is not tried again until its function changes, one that was not
is tried each time. What survives is shown in ``mutants/survivors.diff``.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

SURVIVORS = Path("mutants/survivors.diff")
WHICH_TESTS = Path("mutants/mutmut-stats.json")
"""Which tests come through which function. mutmut asks new tests alone, also where an old one was changed."""
SOURCE = Path("src/pool_managerd")
NOTICED = ("killed", "timeout", "segfault")


def main(arguments: Sequence[str]) -> int:
    """1 when less than ``--least`` percent of the mutants were noticed."""
    asked = _asked(arguments)
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    WHICH_TESTS.unlink(missing_ok=True)
    mutmut, mutators, harness = (
        cast(Any, importlib.import_module(f"mutmut.{name}")) for name in ("__main__", "mutation.mutators", "runners.harness")
    )
    mutators.mutation_operators[:] = [known for known in mutators.mutation_operators if known[1] is not mutators.operator_string]
    everything = mutmut.collect_source_file_mutation_data
    tried: list[tuple[Any, str]] = []

    def chosen(*, mutant_names: Sequence[str]) -> Any:
        mutants, by_path = everything(mutant_names=mutant_names)
        some = _sample([m for m in mutants if m[0].path.is_relative_to(SOURCE / asked.only)], asked.sample, asked.seed)
        tried.extend((data, name) for data, name, _ in some)
        again = [(data, name, result if mutmut.status_by_exit_code[result] in NOTICED else None) for data, name, result in some]
        return again, by_path

    mutmut.collect_source_file_mutation_data = chosen
    _quick_ones_first(harness.PytestRunner, mutmut.state)
    mutmut._run((), asked.jobs)
    outcomes = [(data.path, name, mutmut.status_by_exit_code[data.exit_code_by_key[name]]) for data, name in tried]
    SURVIVORS.write_text(
        "\n".join(
            f"# {name}\n{mutmut.get_diff_for_mutant(name, path=path)}" for path, name, was in outcomes if was not in NOTICED
        )
    )
    share = _report(outcomes)
    return int(share < asked.least)


def _quick_ones_first(runner: Any, state: Any) -> None:
    """Whatever test notices a mutant will do."""
    run_tests = runner.run_tests

    def sorted_ones(self: Any, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        return int(run_tests(self, mutant_name=mutant_name, tests=sorted(tests, key=lambda test: state().duration_by_test[test])))

    runner.run_tests = sorted_ones


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--only", type=Path, default=Path("core"), help="a file or folder below src/pool_managerd")
    parser.add_argument("--sample", type=int, help="so many mutants, each file in proportion; without it all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--least", type=float, default=85.0, help="percent of mutants that have to be noticed")
    return parser.parse_args(arguments)


def _sample(mutants: Sequence[tuple[Any, str, Any]], size: int | None, seed: int) -> list[tuple[Any, str, Any]]:
    """``size`` of them, of each file its part; what is taken of one file does not depend on the others."""
    if size is None or size >= len(mutants):
        return list(mutants)
    files: dict[Path, list[tuple[Any, str, Any]]] = {}
    for mutant in mutants:
        files.setdefault(mutant[0].path, []).append(mutant)
    taken: list[tuple[Any, str, Any]] = []
    for path, of_file in sorted(files.items()):
        part = round(size * len(of_file) / len(mutants)) or 1
        taken += random.Random(f"{seed}:{path}").sample(of_file, part)
    return taken


def _report(outcomes: Sequence[tuple[Path, str, str]]) -> float:
    """Prints a table; the percentage that was noticed."""
    counts: dict[str, list[int]] = {}
    for path, _, was in outcomes:
        of_file = counts.setdefault(str(path.relative_to(SOURCE)), [0, 0, 0])
        of_file[2 if was not in NOTICED else int(was != "killed")] += 1
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)] or [0, 0, 0]
    lines = ["| module | mutants | killed | timed out | survived | noticed |", "|---|--:|--:|--:|--:|--:|"]
    for row, (killed, late, survived) in counts.items():
        total = max(1, killed + late + survived)
        lines.append(f"| {row} | {total} | {killed} | {late} | {survived} | {100 * (killed + late) / total:.0f} % |")
    noticed, total = sum(counts["all"][:2]), max(1, sum(counts["all"]))
    share, (low, high) = 100 * noticed / total, _interval(noticed, total)
    lines.append(f"{noticed} of {total} noticed: {share:.1f} % (95 % confidence: {low:.1f} to {high:.1f} %)")
    sys.stdout.write("\n".join(lines) + "\n")
    return share


def _interval(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval, in percent."""
    share = hits / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return 100 * (middle - half) / (1 + z * z / of), 100 * (middle + half) / (1 + z * z / of)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
