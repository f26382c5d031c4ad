"""RELEASE.yaml → a release manifest, on the publisher's machine.

    model: digits
    version: 3
    files: {cpu.onnx: model.onnx}          # optional: names in the release for paths beside RELEASE.yaml
    variants:
      - {name: cpu, runtime: onnx, file: model.onnx}
    inputs:  [{name: x, datatype: FP32, shape: [-1, 64]}]
    outputs: [{name: y, datatype: FP32, shape: [-1, 10], labels: labels.txt}]
    acceptance:
      golden: [{name: a, inputs: a.in.npz, expected: a.out.npz, compare: {y: {kind: close, atol: 0.001}}}]
    provenance: {source: "…", licence: Apache-2.0}

Paths are relative to the file. A name that `files` does not mention is a path of that name. The other files of an ONNX model
that is several are found in the model, and are those beside it; a variant's `data` may say other ones.
"""

from __future__ import annotations

import datetime as dt
import getpass
import itertools
import re
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
import yaml

from agent.contract.codec import convert
from agent.contract.manifest import ReleaseManifest
from fleet_server.errors import Invalid, NotFound
from fleet_server.releases import blocks
from runtimes import onnx_external
from runtimes.contract import ModelInvalid
from runtimes.file_kinds import what_it_is
from runtimes.tensorrt import header

MAX_RELEASE_YAML_BYTES = 1024 * 1024
ODD = re.compile(r"[^A-Za-z0-9._-]")  # what the names of a release's files have not
FIELDS = frozenset({"model", "version", "files", "variants", "inputs", "outputs", "acceptance", "provenance"})


class Built(msgspec.Struct, frozen=True):
    """A manifest and where the bytes of its files are on this machine."""

    manifest: ReleaseManifest
    paths: dict[str, Path]


def build(release_yaml: Path) -> Built:
    """Raises: NotFound (a file that is named is not there), Invalid (the description breaks a rule, with where)."""
    raw = _read(release_yaml)
    paths: dict[str, Path] = {}
    given = raw.get("files") or {}
    for name in sorted(_named(raw)):
        path = release_yaml.parent / str(given.get(name, name))
        if not path.is_file():
            raise NotFound(f"{release_yaml}: file {name!r} is not at {path}")
        paths[name] = path
    variants = raw.get("variants")
    for variant in variants if isinstance(variants, list) else ():
        if isinstance(variant, dict):
            variant.update(_with_data(variant, paths))
    release_bytes = sum(path.stat().st_size for path in paths.values())
    described = {name: blocks.describe(path, release_bytes) for name, path in paths.items()}
    document: dict[str, Any] = {**raw, "files": msgspec.to_builtins(described)}
    document["provenance"] = {
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "publisher": _me(),
        **(raw.get("provenance") or {}),
    }
    try:
        manifest = convert(document, ReleaseManifest)
    except msgspec.ValidationError as error:
        raise Invalid(f"{release_yaml}: {error}", code="bad_release") from error
    for case in manifest.acceptance.golden:
        for name in (case.inputs, case.expected):
            _check_npz(paths[name])
    return Built(manifest, paths)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error}") from error
    if len(data) > MAX_RELEASE_YAML_BYTES:
        raise Invalid(f"{path} is too large to be a release description")
    try:
        raw = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise Invalid(f"{path} is not YAML: {error}", code="bad_release") from error
    if not isinstance(raw, dict):
        raise Invalid(f"{path} must say model, version and variants", code="bad_release")
    unknown = sorted(str(key) for key in set(raw) - FIELDS)
    if unknown:
        raise Invalid(
            f"{path}: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(FIELDS))}", code="bad_release"
        )
    if not isinstance(raw.get("files") or {}, dict):
        raise Invalid(f"{path}: files must map a name in the release to a path", code="bad_release")
    return raw


def _named(raw: dict[str, Any]) -> set[str]:
    """Every file name the description uses; what is malformed is left for the manifest's own check."""
    used = {str(name) for name in raw.get("files") or {}}

    def add(items: object, *fields: str) -> None:
        for item in items if isinstance(items, list) else []:
            used.update(str(item[f]) for f in fields if isinstance(item, dict) and item.get(f))

    add(raw.get("variants"), "file")
    for variant in raw.get("variants") or ():
        if isinstance(variant, dict) and isinstance(variant.get("data"), dict):
            used.update(map(str, variant["data"].values()))
        if isinstance(variant, dict) and isinstance(variant.get("libraries"), list):
            used.update(map(str, variant["libraries"]))
    add(raw.get("inputs"), "labels")
    add(raw.get("outputs"), "labels")
    add((raw.get("acceptance") or {}).get("golden") if isinstance(raw.get("acceptance"), dict) else None, "inputs", "expected")
    if isinstance(raw.get("provenance"), dict) and raw["provenance"].get("model_card"):
        used.add(str(raw["provenance"]["model_card"]))
    return used


def _with_data(variant: dict[str, Any], paths: dict[str, Path]) -> dict[str, Any]:
    """The variant's `data`, completed with what its model names besides; `paths` gets those files.

    Raises: Invalid when it is no model, names a file that is not there, or one outside of its folder.
    """
    file, listed = str(variant.get("file")), variant.get("data") or {}
    if file in paths and variant.get("runtime") == "tensorrt":
        _check_engine(paths[file])
    if file not in paths or variant.get("runtime") not in ("onnx", "tflite") or not isinstance(listed, dict):
        return {}  # of the files of other runtimes nothing is known here
    path, data = paths[file], dict(listed)
    what = what_it_is(path)
    if what is not None:
        raise Invalid(f"{path} is {what}", code="bad_release")
    try:
        for location in onnx_external.locations(path):
            if location not in data:
                data[location] = _name_for(
                    onnx_external.beside(path, location), str(PurePosixPath(file).parent / location), paths
                )
    except ModelInvalid as error:
        raise Invalid(f"{path}: {error}", code="bad_release") from error
    return {"data": data} if data else {}


def _name_for(path: Path, wished: str, paths: dict[str, Path]) -> str:
    """What the file is called in the release: as it is there already, else `wished`, as far as that is a name and is free."""
    wished = "/".join(ODD.sub("-", step).lstrip("._-") or "data" for step in PurePosixPath(wished).parts)
    others = (f"{wished}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([wished], others) if paths.setdefault(name, path).resolve() == path.resolve())


def _check_npz(path: Path) -> None:
    """A golden case that no device could read is found here, not on ten thousand devices."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                arrays[name]
    except (OSError, ValueError, EOFError) as error:
        raise Invalid(f"{path} is not an .npz without pickled objects: {error}", code="bad_release") from error


def _me() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _check_engine(path: Path) -> None:
    """Raises: Invalid when it is no TensorRT engine, or is not whole."""
    try:
        header.read(path)
    except ModelInvalid as error:
        raise Invalid(f"{path}: {error}", code="bad_release") from error
