"""The arithmetic of docs/explanation/a-million-devices.md, by hand for a few of its numbers."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs/capacity.py"
spec = importlib.util.spec_from_file_location("capacity", PATH)
capacity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capacity)


def computed(**given):
    return {row.name: row.value for row in capacity.needs(given)}


def test_some_numbers_by_hand():
    found = computed(
        devices=60_000,
        heartbeat_s=60,
        poll_interval_s=600,
        look_ms=5,
        load=0.5,
        model_bytes=1e7,
        changed_share=0.2,
        delta_factor=1.0,
    )
    assert found["reports"] == 1000
    assert found["looks without a poke"] == 100
    assert found["processors that answer looks (`api`)"] == 1
    assert found["a release, all of it to every device"] == 600
    assert found["a release, the blocks that changed"] == pytest.approx(120)
    assert found["money: all of it"] == pytest.approx(
        sum(value for name, value in found.items() if name.startswith("money: ")) / 2
    )


def test_whoever_writes_is_alone():
    """Of 250 µs that storing a report takes 100 are its signature, which others may verify meanwhile: 150 are not."""
    found = computed(devices=60_000, events_per_day=0, stored_per_core_s=4000, verified_per_core_s=10_000)
    assert found["time in which one transaction at a time writes"] == pytest.approx(100 * 1000 * 150e-6)


def test_twice_the_devices_need_twice_as_much():
    one, two = computed(devices=1e5), computed(devices=2e5)
    for name in (
        "reports",
        "from devices",
        "processors that store (`ingest`)",
        "memory of all connections to them",
        "money: CDN",
    ):
        assert two[name] == pytest.approx(2 * one[name]), name


def test_what_the_page_says_of_a_million():
    row = "time in which one transaction at a time writes"
    (_, first), (_, million), (_, calm) = capacity.SCENARIOS
    assert computed(**million)[row] > 100, "do not fit"
    assert computed(**calm)[row] < 70, "with one each five minutes they do"
    assert computed(**first)[row] < 70
    assert computed(**million)["processors that answer looks (`api`)"] > computed(**million)["processors that store (`ingest`)"]


def test_every_input_says_what_it_is():
    for name, one in capacity.INPUTS.items():
        assert one.kind in capacity.KINDS, name
        assert len(one.source) > 3, name
        for target in re.findall(r"\]\(([^)]+)\)", one.source):
            assert (ROOT / "docs/explanation" / target).exists(), name


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0044, "0.004"), (0.5, "0.500"), (12.345, "12.3"), (1666.67, "1 670"), (1e6, "1 000 000")]
)
def test_numbers(value, text):
    assert capacity.number(value) == text


def test_another_fleet_by_the_command_of_the_page():
    words = re.search(
        r"^    python docs/capacity.py (.+)$", (ROOT / "docs/explanation/a-million-devices.md").read_text(), re.MULTILINE
    )[1]
    done = subprocess.run([sys.executable, PATH, *words.split()], capture_output=True, text=True, timeout=30, check=True)
    assert "this fleet" in done.stdout
    wrong = subprocess.run([sys.executable, PATH, "device=1"], capture_output=True, text=True, timeout=30, check=False)
    assert wrong.returncode == 1
    assert "there is no input device" in wrong.stderr
