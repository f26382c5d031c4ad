"""Models that go all the way: published with `edge-fleet`, tried by `sync`, served by `serve`, in its process and in one of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from click.testing import CliRunner
from fleet import MODEL

from agent.client import Client
from fleet_server.cli import main as edge_fleet
from tests.e2e.world import World

Arrays = Mapping[str, Any]
WATCH = {"duration_s": 0.1, "max_duration_s": 5}
RUNTIMES = {".onnx": "onnx", ".tflite": "tflite"}


@dataclass(frozen=True)
class Case:
    """What is asked, and what must be answered within `atol`."""

    given: Arrays
    expected: Arrays
    atol: float = 0.0
    signature: str = ""


@dataclass(frozen=True)
class Offer:
    """A model as its publisher has it: a file, what else lies in its folder, and cases."""

    model: str
    file: Path
    cases: Sequence[Case] = ()
    serving: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)
    """`inputs` and `outputs` of the release."""
    max_trial_s: float = 60.0


class Chain(World):
    """Several models beside the one that is asked all the time."""

    def offer(self, offer: Offer, version: int, **serving: object) -> str:
        """Publishes it with a golden case for each of its cases. Why it cannot be published; empty when it was."""
        folder = self.folder / "releases" / f"{offer.model}-{version}"
        shutil.copytree(offer.file.parent, folder)
        golden = []
        for number, case in enumerate(offer.cases):
            np.savez(folder / f"{number}.in.npz", **case.given)
            np.savez(folder / f"{number}.out.npz", **case.expected)
            compare = {name: {"kind": "close", "atol": case.atol} for name in case.expected}
            files = {"inputs": f"{number}.in.npz", "expected": f"{number}.out.npz"}
            golden.append({"name": f"case-{number}", **files, "compare": compare, "signature": case.signature})
        variant = {
            "name": "cpu",
            "runtime": RUNTIMES[offer.file.suffix],
            "file": offer.file.name,
            "serving": {**offer.serving, **serving},
        }
        release = {
            "model": offer.model,
            "version": version,
            "variants": [variant],
            **offer.tensors,
            "acceptance": {"golden": golden, "watch": WATCH, "max_trial_s": offer.max_trial_s},
        }
        (folder / "RELEASE.yaml").write_text(yaml.safe_dump(release))
        key = self.fleet.keys / "releases.key"
        line = [
            "--profile",
            self.processes.environment["EDGE_FLEET_PROFILE"],
            "publish",
            folder / "RELEASE.yaml",
            "--key",
            key,
            "--yes",
        ]
        done = CliRunner().invoke(
            edge_fleet, [*map(str, line)], catch_exceptions=False
        )  # here: a process takes a second to start
        return done.stderr if done.exit_code else ""

    def roll_out_all(self, models: Iterable[str], version: int, limit_s: float = 120.0) -> dict[str, dict[str, Any]]:
        """A rollout for each; the device's answer to each."""
        models = list(models)
        for model in models:
            self.fleet.post("rollouts", {"release": f"{model}:{version}"})
        self.until(
            f"an answer to version {version} of all models: {models}",
            lambda: all(self.answer_of(model, version) for model in models),
            limit_s,
            every_s=0.1,
        )
        return {model: self.answer_of(model, version) for model in models}

    def answer_of(self, model: str, version: int) -> dict[str, Any]:
        """What the device said to it; empty until it has."""
        try:
            state = json.loads((self.device.folder / f"store/sync/updates/{model}.json").read_bytes())
        except FileNotFoundError:
            return {}
        if state["phase"] not in {"steady", "quarantined"}:
            return {}
        return next((answer for answer in reversed(state["answers"]) if answer["release"] == version), {})

    def client(self) -> Client:
        return Client(self.device.socket)

    def process_of(self, model: str) -> int | None:
        """The process of its own that the active version has."""
        with self.client() as client:
            _, _, body = client.request("GET", f"/control/v1/models/{model}")
        told = json.loads(bytes(body))
        pid: int | None = told["versions"][str(told["active"])]["pid"]
        return pid

    def nobody_noticed(self) -> None:
        """The app that asks another model all the time, meanwhile: it got an answer to all, and the right one."""
        assert self.traffic.answered
        assert (self.traffic.failed, self.traffic.wrong, self.traffic.away) == ([], [], 0)


__all__ = ["MODEL", "Case", "Chain", "Offer"]
