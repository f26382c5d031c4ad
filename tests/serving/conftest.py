import pytest

from tests.serving import onnx_models
from tests.serving.server import Device, Server


@pytest.fixture
def serve_files(tmp_path):
    """Starts `edge-agent run` on files; ended with the test."""
    servers = []

    def start(*files, environment=None, options=()):
        made = Server(tmp_path, "run", *files, "--socket", tmp_path / "s.sock", *options, environment=environment)
        servers.append(made)
        return made.start()

    yield start
    for made in servers:
        made.stop()


@pytest.fixture
def device(tmp_path):
    """A store with model `scale` 1 (factor 1, selected) and 2 (factor 2), and a way to serve it."""
    made = Device(tmp_path)
    for version in (1, 2, 3):
        made.release("scale", version, onnx_models.scale(tmp_path / f"scale-{version}.onnx", float(version)))
    made.select("scale", 1)
    servers = []
    start = made.server

    def server(**options):
        servers.append(start(**options))
        return servers[-1]

    made.server = server
    yield made
    for one in servers:
        one.stop()


@pytest.fixture(scope="module")
def scale_server(tmp_path_factory):
    """One server for a file of tests that do not change it: models `scale` (y = 3 x) and `pair`."""
    folder = tmp_path_factory.mktemp("server")
    onnx_models.scale(folder / "scale.onnx", 3.0)
    onnx_models.pair(folder / "pair.onnx")
    server = Server(folder, "run", folder, "--socket", folder / "s.sock").start()
    yield server
    assert server.stop() == 0
