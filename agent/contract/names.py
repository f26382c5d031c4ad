"""The names of things and the one place that says which spellings are allowed."""

from __future__ import annotations

import re

import msgspec

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # no `+ # /`: it is an MQTT topic level and a certificate CN
GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LABEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LABEL_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,7}")

RESERVED_MODEL_NAMES = frozenset({"stats"})  # /v2/models/stats is a route, so a model of that name could not be reached
MAX_LOCATION = 1024  # characters
MAX_VERSION = 2**53 - 1  # what every JSON reader can hold exactly


def check(pattern: re.Pattern[str], value: str, what: str) -> str:
    """`value` itself.  Raises: ValueError naming `what` and the allowed spelling."""
    if not pattern.fullmatch(value):
        raise ValueError(f"{what} {value!r} is not allowed: it must match {pattern.pattern}")
    return value


def check_model(name: str) -> str:
    """`name` itself.  Raises: ValueError when a model may not be called so."""
    if name in RESERVED_MODEL_NAMES:
        raise ValueError(f"model name {name!r} is reserved")
    return check(MODEL_NAME, name, "model name")


def check_location(location: str) -> str:
    """`location` itself: a model's own name for another file of it.  Raises: ValueError when that is no path below the model's
    folder.
    """
    steps = location.split("/")
    if (
        not location
        or len(location) > MAX_LOCATION
        or not location.isprintable()
        or "\\" in location
        or {"", ".."} & set(steps)
    ):
        raise ValueError(
            f"location {location!r} is not allowed: it must be a path below the model's folder, such as model.onnx_data"
        )
    return location


class ReleaseRef(msgspec.Struct, frozen=True, order=True):
    """One release: a model and its version. Written `digits:4`."""

    model: str
    version: int

    def __post_init__(self) -> None:
        check_model(self.model)
        if not 1 <= self.version <= MAX_VERSION:
            raise ValueError(f"version {self.version} of model {self.model!r} must be from 1 to {MAX_VERSION}")

    def __str__(self) -> str:
        return f"{self.model}:{self.version}"

    @classmethod
    def parse(cls, text: str) -> ReleaseRef:
        """The release that `text` (such as `digits:4`) names.  Raises: ValueError with the expected spelling."""
        model, colon, version = text.rpartition(":")
        if not colon or not version.isascii() or not version.isdigit() or len(version) > 16:
            raise ValueError(f"release {text!r} is not MODEL:VERSION, for example digits:4")
        return cls(model, int(version))

    @property
    def target_path(self) -> str:
        """Where the manifest stands among the TUF targets; delegated to publishers by the pattern `releases/*/*`."""
        return f"releases/{self.model}/{self.version}.json"
