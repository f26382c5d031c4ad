"""An operator's word on the device itself: this release may serve here. Durable; it needs no network, and ends when another
release is wanted.

A file per model; the command line writes it, `sync` reads it and removes it.
"""

from __future__ import annotations

from pathlib import Path

from agent.common import files
from agent.contract import names
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format


class Approval(Document, frozen=True, kw_only=True):
    """The release that may serve. `manifest`: the sha256 of what was approved, when that was known; another one is not
    approved.
    """

    version: int
    manifest: str | None = None
    at: float = 0.0
    by: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "approval")


class Approvals:
    """The folder of approvals."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, model: str) -> Approval | None:
        """None when nothing is approved. An approval that cannot be read approves nothing."""
        try:
            return decode(self._path(model).read_bytes(), Approval, limit_bytes=4096)
        except (OSError, ContractError):
            return None

    def given(self, model: str, version: int, manifest: str | None) -> bool:
        """Whether this very release may serve."""
        found = self.find(model)
        return found is not None and found.version == version and found.manifest in (None, manifest)

    def give(self, model: str, approval: Approval) -> None:
        """Raises: OSError."""
        files.make_directory(self._folder)
        files.write(self._path(model), encode(approval))

    def expire(self, model: str, wanted: int | None) -> None:
        """Ends an approval of anything but `wanted`.  Raises: OSError."""
        found = self.find(model)
        if found is not None and found.version != wanted:
            files.remove(self._path(model))

    def _path(self, model: str) -> Path:
        return self._folder / f"{names.check_model(model)}.json"
