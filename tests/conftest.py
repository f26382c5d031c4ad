"""Fixtures of every suite."""

import os
from pathlib import Path

import pytest

# Before anything imports onnxruntime: official builds report usage unless told not to.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["ORT_TELEMETRY_DISABLED"] = "1"

SHARED_MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


@pytest.fixture(scope="session")
def shared_models():
    """The model collection beside the checkout. Absent, its tests are skipped; in CI that would hide them, so there they fail."""
    if not (SHARED_MODELS / "manifest.json").is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{SHARED_MODELS} is missing")
        pytest.skip(f"{SHARED_MODELS} is missing")
    return SHARED_MODELS
