"""The fleet server of the demo, driven as an operator drives it: by its command line, and read over its REST API."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import requests
from processes import Processes, command, free_ports, wait_for

MODEL = "digits"


class Fleet:
    """`edge-fleet` with its data in `folder`. `say` is told every command an operator would type."""

    def __init__(self, folder: Path, processes: Processes, say: Any, tick: Any) -> None:
        self.folder = folder
        self.data = folder / "fleet"
        self.keys = folder / "keys-offline"
        self._processes = processes
        self._say = say
        self._tick = tick
        self._session = requests.Session()

    def run(self, *arguments: object, quiet: bool = False) -> str:
        """Runs `edge-fleet …` to its end.  Raises: StepFailed."""
        if not quiet:
            shown = " ".join(str(word).replace(f"{self.folder}/", "") for word in arguments)
            self._say(f"$ edge-fleet {shown}")
        return self._processes.call(*command("edge-fleet", *arguments))
