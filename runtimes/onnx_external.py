"""Weights that an ONNX file keeps in other files: which files it names, whether it may, and the model with other names for
them.

A release's files lie in the store under their hashes, in one folder, so an engine would not find `model.onnx_data` there. Links
are no way out: ONNX Runtime 1.31 refuses symbolic links, and files with several hard links, in the bodies of If and Loop. So
the model is given to the engine as bytes in which each location is the path of the file that belongs there, seen from the
folder that has them all: nothing is copied but the graph, and no name that the model says is ever opened.

Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from runtimes.contract import ModelInvalid
from runtimes.protobuf import UNREADABLE, Wire, encoded, fields, mapped, message, parts, text

FOLDER_SETTING = "session.model_external_initializers_file_folder_path"
"""What the engine calls the folder from which it finds a model's other files."""

PARTS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Which fields of a part of a model hold which parts, as far as there are tensors in them."""

TENSOR_EXTERNAL, TENSOR_LOCATION = 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
EXTERNAL = 1
LOCATION = "location"


def tensors(data: Wire, part: str = "model") -> Iterator[memoryview]:
    """Every tensor in it, wherever it is: of graphs, of the bodies of If, Loop and Scan, of functions, of constants.  Raises: as
    `fields`.
    """
    inside = PARTS[part]
    for number, value in fields(data):
        kind = inside.get(number)
        if kind == "tensor":
            yield message(value)
        elif kind is not None:
            yield from tensors(message(value), kind)


def locations(path: Path) -> tuple[str, ...]:
    """The names that the model has for its other files, each once; none in a file that is not understood."""
    try:
        found = (entries.get(LOCATION, "") for entries in map(external, tensors(mapped(path))) if entries is not None)
        return tuple(dict.fromkeys(found))
    except UNREADABLE:
        return ()


def external(tensor: memoryview) -> dict[str, str] | None:
    """Where the tensor's values are when they are in another file (location, offset, length)."""
    where, entries = 0, {}
    for number, value in fields(tensor):
        if number == TENSOR_LOCATION and isinstance(value, int):
            where = value
        elif number == TENSOR_EXTERNAL:
            key, entry = _entry(message(value))
            entries[key] = entry
    return entries if where == EXTERNAL else None


def check_location(location: str) -> str:
    """`location` itself.  Raises: ModelInvalid when it is no path below the model's folder, which no honest exporter writes."""
    path = PurePosixPath(location)
    if (
        not location
        or "\0" in location
        or "\\" in location
        or path.is_absolute()
        or ".." in path.parts
        or path == PurePosixPath()
    ):
        raise ModelInvalid(
            f"it keeps weights in {location!r}, which is outside of its folder: save it with its data files beside it"
        )
    return location


def all_beside(path: Path) -> dict[str, Path]:
    """The other files of a model that lies in a folder with them: its name for each, and where it is.  Raises: as `beside`."""
    return {location: beside(path, location) for location in locations(path)}


def beside(path: Path, location: str) -> Path:
    """Where the file is that the model at `path` calls so.  Raises: ModelInvalid when it is missing, or is not below the model's
    folder.
    """
    check_location(location)
    folders = {path.resolve().parent, path.parent.resolve()}  # a model may be a link into a cache that has its data files, too
    file = (path.parent / location).resolve()
    if not any(file.is_relative_to(folder) for folder in folders):
        raise ModelInvalid(
            f"it keeps weights in {location!r}, which is a link out of its folder, to {file}: copy the file there"
        )
    if not file.is_file():
        raise ModelInvalid(f"it keeps weights in {location!r}, which is not there: put that file into {path.parent}")
    return file


def given(path: Path, data: Mapping[str, Path]) -> dict[str, Path]:
    """The files of `data` that the model uses.  Raises: ModelInvalid when it names a file that is not among them."""
    found = {}
    for location in locations(path):
        if location not in data:
            known = ", ".join(map(repr, sorted(data))) or "none"
            raise ModelInvalid(
                f"it keeps weights in {check_location(location)!r}, which its variant does not list as data (listed: {known}): "
                "publish the model with its data files beside it"
            )
        found[location] = data[location]
    return found


def assembled(path: Path, data: Mapping[str, Path]) -> tuple[bytes, Path]:
    """The model as bytes, and the folder from which it finds its `data`.  Raises: ModelInvalid when it cannot be read."""
    files = {location: Path(os.path.abspath(file)) for location, file in data.items()}  # noqa: PTH100 - links stay what they are
    folder = Path(os.path.commonpath([file.parent for file in files.values()]))
    names = {location: str(file.relative_to(folder)) for location, file in files.items()}
    try:
        return _renamed(mapped(path), "model", lambda location: names.get(location, location)), folder
    except UNREADABLE as error:
        raise ModelInvalid(f"{path.name} cannot be read: {error}") from error


def _renamed(data: Wire, part: str, rename: Callable[[str], str]) -> bytes:
    inside = {TENSOR_EXTERNAL: "entry"} if part == "tensor" else PARTS[part]
    pieces: list[Wire] = []
    for number, value, raw in parts(data):
        kind = inside.get(number)
        if kind == "entry":
            key, entry = _entry(message(value))
            entry = rename(entry) if key == LOCATION else entry
            pieces.append(encoded(number, encoded(ENTRY_KEY, key.encode()) + encoded(ENTRY_VALUE, entry.encode())))
        elif kind is not None:
            pieces.append(encoded(number, _renamed(message(value), kind, rename)))
        else:
            pieces.append(raw)
    return b"".join(pieces)


def _entry(data: memoryview) -> tuple[str, str]:
    key = value = ""
    for number, content in fields(data):
        if number == ENTRY_KEY:
            key = text(content)
        elif number == ENTRY_VALUE:
            value = text(content)
    return key, value


def content(path: Path, data: Mapping[str, Path] | None) -> tuple[Path | bytes, Path | None]:
    """What to give to the engine for the model, and the folder from which it finds its other files, where it has some.

    Raises: ModelInvalid when one is missing, or is where no file of a model may be.
    """
    found = all_beside(path) if data is None else given(path, data)
    if all(file == path.parent.absolute() / location for location, file in found.items()):
        return path, None  # the engine finds them by itself
    return assembled(path, found)
