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

Paths are relative to the file. A name that `files` does not mention is a path of that name.
"""

from __future__ import annotations

import datetime as dt
import getpass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from agent.contract.codec import convert
from agent.contract.manifest import ReleaseManifest
from fleet_server.errors import Invalid, NotFound
from fleet_server.releases import chunks

MAX_RELEASE_YAML_BYTES = 1024 * 1024
FIELDS = frozenset({"model", "version", "files", "variants", "inputs", "outputs", "acceptance", "provenance"})


class Built(msgspec.Struct, frozen=True):
    """A manifest and where the bytes of its files are on this machine."""

    manifest: ReleaseManifest
    paths: dict[str, Path]


def build(release_yaml: Path) -> Built:
    """Raises: NotFound (a file that is named is not there), Invalid (the description breaks a rule, with where)."""
    raw = _read(release_yaml)
    names = _named(raw)
    paths: dict[str, Path] = {}
    given = raw.get("files") or {}
    for name in sorted(names):
        path = release_yaml.parent / str(given.get(name, name))
        if not path.is_file():
            raise NotFound(f"{release_yaml}: file {name!r} is not at {path}")
        paths[name] = path
    together = sum(path.stat().st_size for path in paths.values())
    described = {name: chunks.describe(path, together) for name, path in paths.items()}
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

    def take(items: object, *fields: str) -> None:
        for item in items if isinstance(items, list) else []:
            used.update(str(item[f]) for f in fields if isinstance(item, dict) and item.get(f))

    take(raw.get("variants"), "file")
    take(raw.get("inputs"), "labels")
    take(raw.get("outputs"), "labels")
    take((raw.get("acceptance") or {}).get("golden") if isinstance(raw.get("acceptance"), dict) else None, "inputs", "expected")
    if isinstance(raw.get("provenance"), dict) and raw["provenance"].get("model_card"):
        used.add(str(raw["provenance"]["model_card"]))
    return used


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
