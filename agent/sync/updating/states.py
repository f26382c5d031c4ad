"""Where the update states are kept: one file per model, replaced as a whole and durable before anything is done about it.

The states of a team are saved as one: a file with all of them is written first and counts from then on, whatever becomes of the
rest. So they are never found apart.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Sequence
from pathlib import Path

from agent.common import files
from agent.contract import names
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode
from agent.sync.updating import renamed
from agent.sync.updating.update import UpdateState

_MAX_BYTES = 1024 * 1024
_MAX_TEAM_BYTES = 64 * _MAX_BYTES


class _Team(Document, frozen=True, kw_only=True):
    states: tuple[UpdateState, ...]
    format: int = FORMAT


class States:
    """The folder of update states. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._team = folder / ".team.json"
        self._saving = threading.Lock()

    def models(self) -> list[str]:
        """The models that were ever updated here."""
        return sorted(path.stem for path in self.folder.glob("*.json") if names.MODEL_NAME.fullmatch(path.stem))

    def read(self, model: str) -> UpdateState | None:
        """The model's state; a fresh one when there is none, None when it is damaged.  Raises: OSError."""
        for state in self._pending():
            if state.model == model:
                return state
        try:
            return _decode(self._path(model).read_bytes())
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
        with self._saving:
            self._write_out()
            self.write(state)

    def save_team(self, states: Sequence[UpdateState]) -> None:
        """Saves all of them or none.  Raises: OSError; then either none is stored, or all count and are written out by the next
        save.
        """
        data = encode(_Team(states=tuple(states)))
        if len(data) > _MAX_TEAM_BYTES:
            raise OSError(errno.EFBIG, "the states of these models are too large to be saved together")
        with self._saving:
            self._write_out()
            files.make_directory(self.folder, mode=0o700)
            files.write(self._team, data)  # from here on it is so
            self._write_out()

    def _write_out(self) -> None:
        pending = self._pending()
        for state in pending:
            self.write(state)
        if pending:
            files.remove(self._team)
            files.remove(self.folder / renamed.TEAM_FILE)

    def write(self, state: UpdateState) -> None:
        """Replaces the file of one model. Until it is written out, what a team's file says counts instead.  Raises: OSError."""
        files.make_directory(self.folder, mode=0o700)
        files.write(self._path(state.model), encode(state))

    def _pending(self) -> tuple[UpdateState, ...]:
        for path in (self._team, self.folder / renamed.TEAM_FILE):
            with contextlib.suppress(FileNotFoundError, ContractError):
                data = renamed.with_new_words(path.read_bytes())
                return decode(data, _Team, limit_bytes=_MAX_TEAM_BYTES).states
        return ()

    def _path(self, model: str) -> Path:
        return self.folder / f"{names.check_model(model)}.json"


def _decode(data: bytes) -> UpdateState:
    """Raises: ContractError."""
    return decode(renamed.with_new_words(data), UpdateState, limit_bytes=_MAX_BYTES)
