"""Files are counted for the package they are in, and a package below its floor is a failure."""

import pytest

from tests import coverage_floors
from tests.coverage_floors import Measured, by_package

FILES = (
    Measured("agent/cli/serving.py", 10, 5),
    Measured("agent/sync/app.py", 30, 27),
    Measured("agent/sync/gates/watch.py", 10, 10),
    Measured("agent/store.py", 10, 9),
    Measured("runtimes/onnx.py", 10, 1),
    Measured("elsewhere/x.py", 10, 0),
)


def test_the_longest_package_counts():
    found = by_package(FILES, ["agent", "agent/sync", "agent/sync/gates", "runtimes"])
    assert found == {"agent": 70.0, "agent/sync": 90.0, "agent/sync/gates": 100.0, "runtimes": 10.0}


@pytest.mark.parametrize(("floor", "status"), [(70.0, 0), (71.0, 1)])
def test_a_package_below_its_floor(monkeypatch, capsys, floor, status):
    monkeypatch.setattr(coverage_floors, "FLOORS", {"agent": floor, "agent/sync": 50.0})
    monkeypatch.setattr(coverage_floors, "measured", lambda _file: iter(FILES))
    assert coverage_floors.main() == status
    assert ("TOO LOW" in capsys.readouterr().out) == bool(status)


def test_a_package_that_nothing_was_measured_of(monkeypatch, capsys):
    monkeypatch.setattr(coverage_floors, "FLOORS", {"fleet_server": 1.0})
    monkeypatch.setattr(coverage_floors, "measured", lambda _file: iter(FILES))
    assert coverage_floors.main() == 1
    assert "fleet_server" in capsys.readouterr().out
