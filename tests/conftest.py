"""Fixtures of every suite."""

import os
from pathlib import Path

import pytest

# Before anything imports onnxruntime: official builds report usage unless told not to.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["ORT_TELEMETRY_DISABLED"] = "1"

SKIPPED = 6
"""The exit status of a session that skipped tests in CI: pytest has none for it. tests/suite.py does not try such a session again."""

SHARED_MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


@pytest.fixture(scope="session")
def shared_models():
    """The model collection beside the checkout. Absent, its tests are skipped; in CI that would hide them, so there they fail."""
    if not (SHARED_MODELS / "manifest.json").is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{SHARED_MODELS} is missing")
        pytest.skip(f"{SHARED_MODELS} is missing")
    return SHARED_MODELS


def pytest_terminal_summary(terminalreporter, exitstatus):
    if os.environ.get("CI") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_sep("=", "tests were skipped: in CI every test runs, so this is a failure", red=True)


def pytest_sessionfinish(session, exitstatus):
    """A skip hides what was not tested. At home it is a convenience, in CI a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and exitstatus <= pytest.ExitCode.TESTS_FAILED and reporter and reporter.stats.get("skipped"):
        session.exitstatus = SKIPPED
