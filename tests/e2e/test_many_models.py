"""Two models that switch together, with the real fleet server, broker, `sync` and `serve`: heard of, killed in the middle, and told why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from agent.client import Client, ClientError
from tests.e2e.world import DIGITS, GOOD, TREACHEROUS, WATCH, WEAK, World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(180)]
MODELS = ("left", "right")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("world")) as world:
        yield world


def publish(world: World, model: str, version: int, file: str, **acceptance: object) -> None:
    folder = world.folder / f"{model}-{version}"
    folder.mkdir()
    shutil.copy(DIGITS / "models" / file, folder / "model.onnx")
    release = {
        "model": model,
        "version": version,
        "variants": [{"name": "cpu", "runtime": "onnx", "file": "model.onnx"}],
        "acceptance": {"watch": WATCH, **acceptance},
    }
    (folder / "release.yaml").write_text(yaml.safe_dump(release))
    world.fleet.publish(folder / "release.yaml")


def together(world: World, version: int) -> str:
    releases = [f"{model}:{version}" for model in MODELS]
    return str(json.loads(world.fleet.run("rollout", "start", *releases, "--team", "--json"))["id"])


def runs(world: World) -> dict[str, int | None]:
    with Client(world.device.socket) as client:
        models = client.status()["models"]
    return {model: models.get(model, {}).get("active") for model in MODELS}


def state(world: World, model: str) -> dict:
    try:
        return json.loads((world.device.folder / f"store/sync/updates/{model}.json").read_bytes())
    except FileNotFoundError:
        return {"phase": None, "peers": []}


def over(world: World, rollout: str, how: str) -> None:
    world.until(f"{rollout} is {how}", lambda: world.fleet.get(f"rollouts/{rollout}")["state"] == how)


def test_both_or_none(world: World):
    for model in MODELS:
        publish(world, model, 1, WEAK)
        publish(world, model, 2, GOOD)
    over(world, together(world, 1), "completed")
    assert runs(world) == {"left": 1, "right": 1}
    seen = set()

    def done() -> bool:
        seen.add(tuple(runs(world).values()))
        return world.fleet.get(f"rollouts/{rollout}")["state"] == "completed"

    rollout = together(world, 2)
    world.until("both run release 2", done, every_s=0.002)
    assert seen == {(1, 1), (2, 2)}
    for model in MODELS:
        lines = why(world, model)["gates"]
        assert "the fleet has heard of it" in lines[-1]["message"]
        assert [line["gate"] for line in lines] == [
            "assignment",
            "fetch",
            "trial",
            "team",
            "team",
            "activation",
            "watch",
            "watch",
        ]


def test_killed_in_the_middle(world: World):
    for model in MODELS:
        publish(world, model, 3, GOOD)
    rollout = together(world, 3)
    world.until("the switch", lambda: state(world, "left")["phase"] in {"activating", "watching"}, every_s=0.0005)
    world.kill("sync")
    world.kill("serve")
    world.restart("serve")
    world.until("serve is back", lambda: serves(world))
    assert runs(world) in ({"left": 2, "right": 2}, {"left": 3, "right": 3})
    world.restart("sync")
    world.until("the rollout ends", lambda: world.fleet.get(f"rollouts/{rollout}")["state"] in {"completed", "aborted"})
    world.until("all rest", lambda: all(state(world, model)["phase"] in {"steady", "quarantined"} for model in MODELS))
    assert runs(world) in ({"left": 2, "right": 2}, {"left": 3, "right": 3})


def serves(world: World) -> bool:
    try:
        return None not in runs(world).values()
    except ClientError:
        return False


def test_one_bad_takes_both_back(world: World):
    before = runs(world)
    ask(world, 30)  # what callers are used to
    publish(world, "left", 4, GOOD)
    publish(world, "right", 4, TREACHEROUS, watch={**WATCH, "duration_s": 30})
    rollout = together(world, 4)
    world.until("both watched", lambda: {state(world, model)["phase"] for model in MODELS} == {"watching"}, every_s=0.002)
    ask(world, 40)
    over(world, rollout, "aborted")
    world.until("both are back", lambda: runs(world) == before)

    assert why(world, "right")["quarantine"][-1]["answer"]["release"] == 4
    assert why(world, "left")["went_back"][-1]["reason"] == "together"


def ask(world: World, times: int) -> None:
    """Two pictures in one request, of `right`."""
    image = {"name": "image", "shape": [2, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 128}
    body = json.dumps({"inputs": [image]}).encode()
    with Client(world.device.socket) as client:
        for _ in range(times):
            client.request("POST", "/v2/models/right/infer", body)


def why(world: World, model: str) -> dict:
    command = [sys.executable, "-m", "agent.cli", "why", model, "--json", "--config", str(world.device.folder / "agent.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
