"""Which TensorRT library is here. Only to be called in a process that may die."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from runtimes.contract import RuntimeUnavailable

INSTALL = (
    "install TensorRT-RTX with: pip install 'edge-inference-agent[tensorrt-rtx]'; on a Jetson, TensorRT comes with JetPack"
)

LIBRARIES = (
    ("TensorRT", "tensorrt"), ("TensorRT", "tensorrt_lean"), ("TensorRT-RTX", "tensorrt_rtx"), ("TensorRT-RTX", "tensorrt_rtx_bindings"),
)  # fmt: skip
"""In the order in which they are preferred: what it is called, and its module. The lean one only runs engines."""


def builder() -> tuple[str, Any]:
    """What the first library is called that can be imported here and has a builder, and its module.  Raises: RuntimeUnavailable."""
    return _first(lambda _, module: hasattr(module, "Builder"), "builds engines")


def runner(label: str | None = None) -> tuple[str, Any]:
    """As `builder`, of those that run engines of `label` (None: of any).  Raises: RuntimeUnavailable."""
    return _first(
        lambda called, module: label in (None, called) and hasattr(module, "Runtime"), f"runs engines of {label or 'TensorRT'}"
    )


def logger(trt: Any) -> Any:
    """A logger of the library that keeps in `errors` what went wrong."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                self.errors.append(message)

    return Log()


def _first(fits: Callable[[str, Any], bool], does: str) -> tuple[str, Any]:
    reasons = []
    for label, name in LIBRARIES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # noqa: BLE001 - a library whose own libraries are missing may raise anything
            reasons.append(f"{name}: {error}")
            continue
        if fits(label, module):
            return label, module
    raise RuntimeUnavailable("; ".join([f"no TensorRT library that {does} is installed", *reasons, INSTALL]))
