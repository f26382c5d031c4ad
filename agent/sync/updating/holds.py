"""An operator's word on the device itself: this model stays on this release, or rolls back to it, whatever the fleet wants.

A file per held model; the command line writes it, `sync` reads it. Only a withdrawal is stronger.
"""

from __future__ import annotations

from pathlib import Path

from agent.common import files
from agent.contract import names
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format


class Hold(Document, frozen=True, kw_only=True):
    """The release that a model is held on."""

    version: int
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "hold")


class Holds:
    """The folder of holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def held(self, model: str) -> int | None:
        """The release the model is held on; None when it follows the fleet. A hold that cannot be read holds nothing."""
        try:
            return decode(self._path(model).read_bytes(), Hold, limit_bytes=4096).version
        except (OSError, ContractError):
            return None

    def hold(self, model: str, version: int) -> None:
        """Raises: OSError."""
        files.make_directory(self._folder)
        files.write(self._path(model), encode(Hold(version=version)))

    def unhold(self, model: str) -> bool:
        """Lets the model follow the fleet again. False when it was not held.  Raises: OSError."""
        held = self._path(model).exists()
        if held:
            files.remove(self._path(model))
        return held

    def _path(self, model: str) -> Path:
        return self._folder / f"{names.check_model(model)}.json"
