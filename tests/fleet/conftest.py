"""Fixtures of the fleet server's tests. One server serves a whole file; tests that break it make their own."""

import shutil

import msgspec
import pytest

from fleet_server.app import Fleet
from fleet_server.broker import settings as broker_settings
from fleet_server.config import FleetConfig, Folder, RolloutSettings
from fleet_server.errors import Unavailable
from fleet_server.sections import BrokerSettings
from fleet_server.setup import init
from tests.fleet import databases
from tests.fleet.stand import Server


def pytest_collection_modifyitems(config, items):
    if databases.ON_POSTGRESQL:
        left_out = [item for item in items if item.get_closest_marker("sqlite")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session", autouse=True)
def _mosquitto():
    try:
        broker_settings.find_mosquitto(BrokerSettings())
    except Unavailable:
        pytest.skip("mosquitto is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server, shared by the tests of one file."""
    made = Server(tmp_path_factory.mktemp("fleet")).start()
    yield made
    made.stop()


@pytest.fixture
def own_server(tmp_path):
    """A server for one test, made but not started."""
    made = Server(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def connect():
    """Connects devices to the broker and takes them off again."""
    devices = []

    def connected(device, **options):
        devices.append(device)
        return device.connect(**options)

    yield connected
    for device in devices:
        device.disconnect()


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture(scope="session")
def _folder_template(tmp_path_factory):
    """`init` once; its folder is copied for every test that works in this process."""
    base = tmp_path_factory.mktemp("template")
    config = FleetConfig(fleet="test", hosts=("127.0.0.1",), database_url=databases.new())
    init(Folder(base / "fleet"), config, offline_keys=base / "offline", profile=base / "profile.yaml")
    return base, config


@pytest.fixture
def clock():
    import time

    return Clock(time.time())


@pytest.fixture
def settings():
    """How rollouts are judged; a test gives others by its parameters."""
    return RolloutSettings()


@pytest.fixture
def fleet(_folder_template, tmp_path, clock, settings):
    """Every part of the server in this process, without sockets."""
    template, config = _folder_template
    base, database_url = tmp_path / "inside", databases.new(config.database_url)
    shutil.copytree(template, base)
    config = msgspec.structs.replace(config, rollouts=settings, database_url=database_url)
    made = Fleet(Folder(base / "fleet"), config, clock)
    made.releases_key = base / "offline" / "releases.key"
    yield made
    made.close()
    databases.drop(database_url)
