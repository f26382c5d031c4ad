"""What is on disk: blobs, releases, and which release of each model is active. `sync` writes it, `serve` reads it.

    <root>/format.json                     {"format": 1}
    <root>/blobs/<sha256>                  immutable bytes, complete and verified; never written in place
    <root>/releases/<model>/<version>.json the manifest as it was signed; written after all its blobs
    <root>/models/<model>.json             the Selection: what `serve` loads when it starts
    <root>/models/.team.json               selections of a team, made at once, that are being written there; they count
    <root>/staging/                        downloads under way; only `sync` reads it
    <root>/sync/                           what only `sync` reads: update states, trust, outbox

Order is what makes it crash-proof: blobs before the manifest, the manifest before the selection, and each of them durable
before the next. So whatever a selection names is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.common import files
from agent.contract import names
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode
from agent.contract.manifest import MAX_MANIFEST_BYTES, ReleaseManifest, Variant, model_sha256, parse_manifest
from agent.host.priority import rest

HASH_BYTES = 64 * 1024

_T = TypeVar("_T", bound=Document)


class StoreError(Exception):
    """The store cannot be used as it is; the message says which file and what to do."""


class Choice(Document, frozen=True, kw_only=True):
    """One release of a model and the variant that this device runs."""

    version: int
    variant: str


class Selection(Document, frozen=True, kw_only=True):
    """Which release of a model serves. `previous` is what a rollback returns to; None before the second release."""

    model: str
    active: Choice
    previous: Choice | None = None
    format: int = FORMAT


class _Team(Document, frozen=True, kw_only=True):
    selections: dict[str, Selection | None]
    format: int = FORMAT


class Release(msgspec.Struct, frozen=True):
    """A release in the store, with the variant that was chosen for this device."""

    manifest: ReleaseManifest
    variant: Variant
    path: Path
    """The variant's model file."""
    data: dict[str, Path]
    """The other files of its model, by the name that the model has for each."""
    libraries: tuple[Path, ...] = ()


class SelectionFiles:
    """The files of selections: one for each model, and one of a team while it is being written there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._team = folder / ".team.json"
        self._team_before = folder / ".together.json"  # its name in version 0.1.0, which may have left one

    def begin(self, selections: Mapping[str, Selection | None]) -> None:
        """Makes all of these count at once.  Raises: OSError."""
        files.write(self._team, encode(_Team(selections=dict(selections))))

    def pending(self) -> dict[str, Selection | None]:
        """What counts and is not yet in the files of its models.  Raises: StoreError when it cannot be read."""
        for path in self._team, self._team_before:
            if (found := _read(path, _Team, 4 * 1024 * 1024)) is not None:
                return found.selections
        return {}

    def write_out(self) -> None:
        """Writes what was selected for a team to the file of each model. Harmless to repeat.  Raises: StoreError, OSError."""
        for model, selection in self.pending().items():
            self.put(model, selection)
        files.remove(self._team)
        files.remove(self._team_before)

    def put(self, model: str, selection: Selection | None) -> None:
        """Raises: OSError."""
        path = self._path(model)
        if selection is None:
            files.remove(path)
        else:
            files.write(path, encode(selection))

    def written(self, model: str) -> Selection | None:
        """What the model's own file says; None when there is none.  Raises: StoreError when it is damaged."""
        return _read(self._path(model), Selection, 64 * 1024)

    def all_written(self) -> dict[str, Selection | StoreError]:
        found: dict[str, Selection | StoreError] = {}
        for path in self.folder.glob("*.json"):
            if path.name.startswith("."):
                continue
            try:
                selection = self.written(path.stem)
            except (StoreError, ValueError, OSError) as error:
                found[path.stem] = StoreError(str(error))
            else:
                if selection is not None:
                    found[path.stem] = selection
        return found

    def put_aside_damaged(self) -> None:
        """A record of a team that cannot be read says nothing of any member: the selections of before count, as `serve` sees
        it.
        """
        try:
            self.pending()
        except StoreError:
            for path in self._team, self._team_before:
                with contextlib.suppress(FileNotFoundError):
                    path.replace(path.with_name(f"{path.name}.damaged"))
            files.sync_directory(self.folder)

    def _path(self, model: str) -> Path:
        return self.folder / f"{names.check_model(model)}.json"


class Store:
    """Reads and writes one store folder. One process may write at a time: `sync` holds its own lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.staging = root / "staging"
        self.private = root / "sync"
        self._releases = root / "releases"
        self._selections = SelectionFiles(root / "models")
        self._selecting = threading.Lock()

    @classmethod
    def create(cls, root: Path) -> Store:
        """Opens the store at `root`, making it when it is not there.  Raises: StoreError, OSError."""
        store = cls(root)
        for directory in (root, store.blobs, store.staging, store._releases, store._selections.folder):
            files.make_directory(directory)
        files.make_directory(store.private, mode=0o700)
        if not (root / "format.json").exists():
            files.write(root / "format.json", encode({"format": FORMAT}))
        store.check_format()
        with store._selecting:
            store._selections.put_aside_damaged()
            store._selections.write_out()
        return store

    def check_format(self, *, may_be_missing: bool = False) -> None:
        """Raises: StoreError when the store was written by a newer version, or is not a store. One that `sync` has not made yet
        is empty to whoever says that it `may_be_missing`.
        """
        path = self.root / "format.json"
        try:
            number = decode(path.read_bytes(), dict[str, int], limit_bytes=1024).get("format")
        except FileNotFoundError:
            if may_be_missing:
                return
            raise StoreError(f"{self.root} is not a store: {path.name} is missing; start `edge-agent sync` once") from None
        except ContractError as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        if number != FORMAT:
            raise StoreError(
                f"{self.root} has store format {number}, this version reads {FORMAT}: install the version that wrote it"
            )

    # -- blobs -------------------------------------------------------------------------------------------------------------

    def blob(self, sha256: str) -> Path:
        """Where the bytes with this hash are, or would be."""
        return self.blobs / names.check(names.SHA256, sha256, "sha256")

    def has_blob(self, sha256: str) -> bool:
        return self.blob(sha256).is_file()

    def file(self, manifest: ReleaseManifest, name: str) -> Path:
        """The file called `name` in the release.  Raises: KeyError."""
        return self.blob(manifest.files[name].sha256)

    # -- releases ----------------------------------------------------------------------------------------------------------

    def write_manifest(self, data: bytes, needed: Collection[str] | None = None) -> ReleaseManifest:
        """Keeps a verified manifest. The blobs of its `needed` files (None: of all of them) must be in the store already; a
        device does not need the files of variants that it does not run.

        Raises: ContractError; StoreError when a blob is missing; OSError.
        """
        manifest = parse_manifest(data)
        for name, file in manifest.files.items():
            if (needed is None or name in needed) and not self.has_blob(file.sha256):
                raise StoreError(f"release {manifest.ref}: file {name!r} ({file.sha256}) is not in the store")
        path = self.manifest_path(manifest.ref)
        files.make_directory(path.parent)
        files.write(path, data)
        return manifest

    def manifest_bytes(self, ref: names.ReleaseRef) -> bytes:
        """The manifest exactly as it was signed.  Raises: StoreError when the release is not in the store."""
        path = self.manifest_path(ref)
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise StoreError(f"{path} is larger than a manifest may be")
            return path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"release {ref} is not in the store {self.root}") from None

    def manifest(self, ref: names.ReleaseRef) -> ReleaseManifest:
        """Raises: StoreError when the release is not in the store or its manifest is damaged."""
        return self.parse(ref, self.manifest_bytes(ref))

    def manifest_stamp(self, ref: names.ReleaseRef) -> tuple[int, int, int]:
        """Changes with the manifest's file.  Raises: StoreError when the release is not in the store."""
        try:
            found = self.manifest_path(ref).stat()
        except FileNotFoundError:
            raise StoreError(f"release {ref} is not in the store {self.root}") from None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def parse(self, ref: names.ReleaseRef, data: bytes) -> ReleaseManifest:
        """The manifest that these bytes of the release's file are.  Raises: StoreError when they are damaged."""
        try:
            return parse_manifest(data, expected=ref)
        except ValueError as error:
            raise StoreError(f"{self.manifest_path(ref)} is damaged: {error}") from error

    def release(self, model: str, choice: Choice) -> Release:
        """The release to load, the files of its model checked against the manifest's hashes.

        Raises: StoreError when anything of it is missing or does not match.
        """
        ref = names.ReleaseRef(model, choice.version)
        manifest = self.manifest(ref)
        try:
            variant = manifest.variant(choice.variant)
        except KeyError:
            raise StoreError(f"release {ref} has no variant {choice.variant!r}") from None
        for name in dict.fromkeys(variant.files):
            expected = manifest.files[name].sha256
            actual = hash_file(self.blob(expected))
            if actual != expected:
                what = f"hash mismatch of {name!r} (expected {expected}, got {actual})"
                raise StoreError(f"cannot load model {model!r} version {choice.version}: {what}")
        return Release(
            manifest,
            variant,
            self.file(manifest, variant.file),
            self.data_of(manifest, variant),
            self.libraries_of(manifest, variant),
        )

    def libraries_of(self, manifest: ReleaseManifest, variant: Variant) -> tuple[Path, ...]:
        """Where the files with operators for the variant's engine are."""
        return tuple(self.file(manifest, name) for name in variant.libraries)

    def data_of(self, manifest: ReleaseManifest, variant: Variant) -> dict[str, Path]:
        """Where the other files of the variant's model are, by the name that the model has for each."""
        return {location: self.file(manifest, name) for location, name in variant.data.items()}

    def releases(self) -> list[names.ReleaseRef]:
        """Every release in the store, sorted."""
        return sorted(
            names.ReleaseRef(path.parent.name, int(path.stem))
            for path in self._releases.glob("*/*.json")
            if path.stem.isdigit()
        )

    def remove_manifest(self, ref: names.ReleaseRef) -> None:
        files.remove(self.manifest_path(ref))

    def manifest_path(self, ref: names.ReleaseRef) -> Path:
        return self._releases / ref.model / f"{ref.version}.json"

    # -- selections --------------------------------------------------------------------------------------------------------

    def select(self, selection: Selection) -> None:
        """Makes `selection` what `serve` loads from its next start on. The running `serve` is told by a control route.  Raises:
        OSError.
        """
        self._change({selection.model: selection})

    def deselect(self, model: str) -> None:
        """The model is no longer served from the next start on.  Raises: OSError."""
        self._change({model: None})

    def select_team(self, selections: Mapping[str, Selection | None]) -> None:
        """`select` for several models, and `deselect` for those with None: all of them or none, whatever happens in between.

        Raises: OSError; then either nothing was selected, or all of it counts and is written out by the next change.
        """
        for model in selections:
            names.check_model(model)
        with self._selecting:
            self._selections.write_out()
            self._selections.begin(selections)  # from here on it is so
            self._selections.write_out()

    def _change(self, selections: Mapping[str, Selection | None]) -> None:
        with self._selecting:
            self._selections.write_out()
            for model, selection in selections.items():
                self._selections.put(model, selection)

    def selection(self, model: str) -> Selection | None:
        """None when the model was never activated.  Raises: StoreError when the record is damaged."""
        pending = self._selections.pending()
        return pending[model] if model in pending else self._selections.written(model)

    def selections(self) -> dict[str, Selection | StoreError]:
        """What is selected for every model; the error in place of a record that cannot be read, so that one does not hide the
        rest.
        """
        while True:
            pending = self._pending_or_none()
            found = self._selections.all_written()
            for model, selection in pending.items():
                found.pop(model, None)
                if selection is not None:
                    found[model] = selection
            if pending == self._pending_or_none():  # else a team was selected meanwhile
                return dict(sorted(found.items()))

    def _pending_or_none(self) -> dict[str, Selection | None]:
        try:
            return self._selections.pending()
        except (StoreError, OSError):
            return {}


def _read(path: Path, kind: type[_T], limit_bytes: int) -> _T | None:
    """The record in the file; None when there is none.  Raises: StoreError when it is damaged."""
    try:
        return decode(path.read_bytes(), kind, limit_bytes=limit_bytes)
    except FileNotFoundError:
        return None
    except ContractError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def hash_model(path: Path, data: Mapping[str, Path]) -> str:
    """One hash for a model of one file or several, as manifests have it.  Raises: StoreError when one is not there; OSError."""
    return model_sha256(hash_file(path), {location: hash_file(file) for location, file in data.items()})


def hash_file(path: Path) -> str:
    """The sha256 of the file's bytes, in hex.  Raises: StoreError when it is not there; OSError."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(HASH_BYTES):
                digest.update(chunk)
                rest()
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    return digest.hexdigest()
