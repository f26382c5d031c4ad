"""Runs a suite: `python -m tests.suite short|long|survival|server [options of pytest]`.

Its passes run one after the other. What failed in them runs once more at the end, one test at a time. A test that passes then is printed
as FLAKY: it does not fail the suite, and is to be mended next. A test that fails twice fails the suite. The short suite, when it is run
whole, measures branch coverage too, and a package below its floor fails it.

Exit status: 0 passed, 1 a test failed or a package is below its floor, 5 the options chose no test, 6 a test was skipped in CI; others as
pytest has them. After 2, 3, 4 and 6 nothing more is run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import coverage_floors

ROOT = Path(__file__).resolve().parents[1]

PASSED, FAILED, NONE_CHOSEN = 0, 1, 5

SHORT = "not long and not survival and not gpu"
MEASURED = ("--cov", "--cov-report=")  # branch coverage: tests/coverage_floors.py
SUITES: dict[str, tuple[tuple[str, ...], ...]] = {
    # several at a time, a file to each, what minds nobody. Three, because two leave two processors waiting a third of the time.
    # Then the rest: two at a time, because the processors rest for half of it; what measures for long is among the long ones, one by one.
    "short": (
        ("-n", "3", "--dist", "loadfile", "-m", f"{SHORT} and not alone"),
        ("-n", "2", "--dist", "loadfile", "-m", f"{SHORT} and alone"),
    ),
    "long": (("-n", "2", "--dist", "loadfile", "-m", "long and not alone"), ("-m", "long and alone")),
    "survival": (("-m", "survival"),),
    # on PostgreSQL, as EDGE_TEST_DATABASE says
    "server": (
        ("-n", "3", "--dist", "loadfile", "-m", f"{SHORT} and not alone", "tests/fleet"),
        ("-n", "2", "--dist", "loadfile", "-m", f"{SHORT} and alone", "tests/fleet"),
    ),
}
"""The passes of each suite, each the options of one run of pytest."""


def _pytest(root: Path, *options: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *options], cwd=root, check=False).returncode


def _failed(root: Path) -> list[str]:
    """The tests whose last run failed, as pytest remembers them."""
    try:
        return sorted(json.loads((root / ".pytest_cache/v/cache/lastfailed").read_text()))
    except FileNotFoundError:
        return []


def run(passes: Sequence[Sequence[str]], options: Sequence[str], root: Path = ROOT) -> int:
    """Runs the passes in `root` and, once more, what failed in them. The exit status, as the module describes it."""
    statuses = set()
    for number, one in enumerate(passes):
        status = _pytest(root, *one, *options, *(["--cache-clear"] if number == 0 else []))
        if status not in {PASSED, FAILED, NONE_CHOSEN}:  # interrupted, or pytest itself failed: what it remembers is not whole
            return status
        statuses.add(status)
    if FAILED not in statuses:
        return NONE_CHOSEN if statuses == {NONE_CHOSEN} else PASSED
    first = _failed(root)
    if not first:
        return FAILED
    print(f"\nonce more, what failed ({len(first)}):", flush=True)
    again = _pytest(root, "--last-failed", "--last-failed-no-failures=none", *options)
    twice = _failed(root) if again == FAILED else []
    if again not in {PASSED, FAILED} or (again == FAILED and not twice):
        return FAILED
    for name in first:
        if name not in twice:
            print(f"FLAKY {name}: failed, then passed; mend it next")
    return FAILED if twice else PASSED


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a suite of tests.")
    parser.add_argument("suite", choices=SUITES)
    chosen, options = parser.parse_known_args()
    if chosen.suite != "short" or options:
        return run(SUITES[chosen.suite], options)
    first, *others = SUITES["short"]
    return run(((*first, *MEASURED), *others), ()) or coverage_floors.main()


if __name__ == "__main__":
    sys.exit(main())
