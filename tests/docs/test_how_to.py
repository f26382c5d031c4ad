"""The Python of the how-to pages is run, as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agent import config as agent_config
from fleet_server import config as fleet_config
from tests.serving.server import Server

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples/digits/models"
PAGE = (ROOT / "docs/how-to/ask-a-model.md").read_text()


@pytest.mark.filterwarnings("ignore")  # tritonclient and gevent warn about themselves
def test_every_block_of_ask_a_model(tmp_path):
    served = (f"digits={MODELS}/digits-v2-int8-qdq.onnx", f"lite={MODELS}/digits-v2-int8.tflite")
    assert all(f"{name}=examples/digits/models/{Path(path).name}" in PAGE for name, path in (one.split("=") for one in served))
    server = Server(
        tmp_path, "run", *served, "--socket", tmp_path / "s.sock", "--http", "127.0.0.1:0", "--grpc-socket", tmp_path / "g.sock"
    )
    server.start()
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    for said, meant in (
        ("/tmp/edge.sock", str(server.socket)), ("/tmp/edge-grpc.sock", f"{tmp_path}/g.sock"), ("127.0.0.1:8000", f"127.0.0.1:{server.port()}"),
    ):  # fmt: skip
        assert said in program
        program = program.replace(said, meant)
    (tmp_path / "page.py").write_text(program + "client.close()\n")
    try:
        done = subprocess.run([sys.executable, tmp_path / "page.py"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["behind-a-proxy", "move-a-server", "reverse-proxy"])
def test_settings_on_pages_about_addresses_can_be_written_so(name, tmp_path):
    blocks = re.findall(r"^( *)```yaml\n(.*?)^ *```", (ROOT / f"docs/how-to/{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for indent, block in blocks:
        settings = yaml.safe_load(re.sub(f"^{indent}", "", block, flags=re.MULTILINE))
        agents = "sync" in settings
        path = tmp_path / ("agent.yaml" if agents else "fleet.yaml")
        path.write_text(yaml.safe_dump(settings if agents else {"fleet": "x", "hosts": ["fleet.example.org"], **settings}))
        agent_config.load(path) if agents else fleet_config.load(fleet_config.Folder(tmp_path))
