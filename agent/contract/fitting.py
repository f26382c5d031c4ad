"""Whether a variant of a release can run on some hardware. Devices choose by it, and the fleet server foresees by it what they choose."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from agent.contract.manifest import ReleaseManifest, Variant
from agent.contract.reports import Hardware

_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_SAME_ARCH = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def needed_files(manifest: ReleaseManifest, variant: Variant) -> frozenset[str]:
    """The names of the release's files that a device needs which runs this variant: all but the model files of the others."""
    others = {name for other in manifest.variants for name in other.files} - set(variant.files)
    named = {tensor.labels for tensor in (*manifest.inputs, *manifest.outputs)}
    named |= {name for golden in manifest.acceptance.golden for name in (golden.inputs, golden.expected)}
    return frozenset(name for name in manifest.files if name not in others or name in named)


def unfit(variant: Variant, hardware: Hardware) -> str | None:
    """Why the variant cannot run here; None when it can."""
    requires = variant.requires
    if variant.runtime not in hardware.runtimes:
        return f"runtime {variant.runtime!r} does not work here (working: {', '.join(sorted(hardware.runtimes)) or 'none'})"
    if requires.arch and _arch(hardware.arch) not in {_arch(name) for name in requires.arch}:
        return f"needs {' or '.join(requires.arch)}, this is {hardware.arch}"
    if requires.accelerator and requires.accelerator != hardware.accelerator:
        return f"needs accelerator {requires.accelerator!r}, this device has {hardware.accelerator or 'none'}"
    if requires.memory_bytes and requires.memory_bytes > hardware.memory_bytes:
        return f"needs {requires.memory_bytes} bytes of memory, this device has {hardware.memory_bytes}"
    if requires.runtime_version and not satisfies(hardware.runtimes[variant.runtime], requires.runtime_version):
        return f"needs {variant.runtime} {requires.runtime_version}, here is {hardware.runtimes[variant.runtime]}"
    return None


def satisfies(version: str, demand: str) -> bool:
    """Whether a version such as `onnxruntime 1.31.1` meets a demand such as `>=1.20,<2`. An unreadable demand is not met."""
    numbers = _numbers(version)
    for part in demand.split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|>|<)?\s*(\d+(?:\.\d+)*)\s*", part)
        if not match:
            return False
        wanted = tuple(int(n) for n in match[2].split("."))
        width = len(wanted)
        padded = (numbers + (0,) * width)[: max(width, len(numbers))]
        # "==1.2" and a bare "1.2" mean any 1.2.x
        actual = padded[:width] if match[1] in ("==", None) else padded
        if not _COMPARE[match[1] or "=="](actual, wanted):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.findall(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in found[-1].split(".")) if found else ()


def _arch(name: str) -> str:
    return _SAME_ARCH.get(name.lower(), name.lower())
