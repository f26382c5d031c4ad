"""Branch coverage of each package, and the least that it may be: `python -m tests.coverage_floors`, which ends `make test`.

Measured is what runs in the tests' own processes. What only runs in the daemons and commands that tests start is not seen: it would take
the tests half as long again. So a command line stands low here although each command is tried, and a floor is no aim: it stands some two
points below what was measured when it was set, and tells of a package whose tests were left behind. Raise it when the figure has risen.

Exit status 1 when a package is below its floor.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import coverage

ROOT = Path(__file__).resolve().parents[1]
FLOORS: Mapping[str, float] = {
    "agent": 87,
    "agent/cli": 23,
    "agent/client": 88,
    "agent/contract": 92,
    "agent/host": 84,
    "agent/serving": 55,
    "agent/serving/scheduling": 92,
    "agent/sync": 79,
    "agent/sync/gates": 95,
    "agent/sync/trust": 94,
    "agent/sync/updating": 93,
    "fleet_server": 66,
    "fleet_server/releases": 71,
    "fleet_server/rollouts": 88,
    "runtimes": 82,
}
"""Package → percent of its lines and branches, those of packages named here for themselves left out."""


class Measured(NamedTuple):
    """Of one file: how many lines and branches it has, and how many of them ran."""

    path: str
    known: int
    covered: int


def measured(data_file: Path) -> Iterator[Measured]:
    """Every file of the packages.  Raises: coverage.CoverageException when nothing was measured."""
    data = coverage.Coverage(data_file=data_file, config_file=ROOT / "pyproject.toml")
    data.load()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        data.json_report(outfile=file.name)
        files = json.loads(Path(file.name).read_bytes())["files"]
    for name, one in files.items():
        counts = one["summary"]
        known = counts["num_statements"] + counts["num_branches"]
        yield Measured(name, known, counts["covered_lines"] + counts["covered_branches"])


def by_package(files: Iterable[Measured], packages: Iterable[str]) -> dict[str, float]:
    """Package → percent. A file belongs to the longest package that its path begins with."""
    longest_first = sorted(packages, key=len, reverse=True)
    known: defaultdict[str, int] = defaultdict(int)
    covered: defaultdict[str, int] = defaultdict(int)
    for file in files:
        package = next((one for one in longest_first if file.path.startswith(f"{one}/")), None)
        if package is not None:
            known[package] += file.known
            covered[package] += file.covered
    return {package: 100 * covered[package] / known[package] for package in sorted(known)}


def main() -> int:
    found = by_package(measured(ROOT / ".coverage"), FLOORS)
    below = [package for package, floor in FLOORS.items() if found.get(package, 0.0) < floor]
    print("branch coverage, and its floor")
    for package, floor in FLOORS.items():
        print(f"  {package:28} {found.get(package, 0.0):5.1f} %  {floor:3.0f} %{'  TOO LOW' if package in below else ''}")
    return bool(below)


if __name__ == "__main__":
    sys.exit(main())
