"""Where the update states are kept: one file per model, replaced as a whole and durable before anything is done about it."""

from __future__ import annotations

from pathlib import Path

from agent.contract import names
from agent.contract.codec import ContractError, decode, encode
from agent.host import files
from agent.sync.update import UpdateState

_MAX_BYTES = 1024 * 1024


class States:
    """The folder of update states."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def models(self) -> list[str]:
        """The models that were ever updated here."""
        return sorted(path.stem for path in self.folder.glob("*.json") if names.MODEL_NAME.fullmatch(path.stem))

    def read(self, model: str) -> UpdateState | None:
        """The model's state; a fresh one when there is none, None when it is damaged.  Raises: OSError."""
        try:
            return decode(self._path(model).read_bytes(), UpdateState, limit_bytes=_MAX_BYTES)
        except FileNotFoundError:
            return UpdateState(model=model)
        except ContractError:
            return None

    def load(self, model: str) -> UpdateState:
        """Like `read`, for the one who goes on with it.

        A damaged state is put aside as `<model>.json.damaged` and forgotten: what serves is in the selection, not here, and
        an update that was under way begins again.  Raises: OSError.
        """
        state = self.read(model)
        if state is None:
            path = self._path(model)
            path.replace(path.with_name(f"{path.name}.damaged"))
            files.sync_directory(self.folder)
        return state or UpdateState(model=model)

    def save(self, state: UpdateState) -> None:
        """Raises: OSError, and then the stored state is still the one before."""
        files.make_directory(self.folder, mode=0o700)
        files.write(self._path(state.model), encode(state))

    def _path(self, model: str) -> Path:
        return self.folder / f"{names.check_model(model)}.json"
