"""`edge-fleet build`: TensorRT engines from ONNX models, on the publisher's machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet_server.cli import tables
from fleet_server.cli.command import EXIT_FAILED, Command, duration, reports_errors, show, with_json
from fleet_server.errors import Invalid

if TYPE_CHECKING:
    from runtimes.tensorrt.engines import Builder, Engine, Progress
    from runtimes.tensorrt.order import Order, Profile

_CAPABILITY = re.compile(r"sm[0-9]{2,3}")
_SHAPE = re.compile(r"[0-9]+(x[0-9]+)*")
_MEMORY = re.compile(r"([0-9]+)(M|G)B?", re.IGNORECASE)
_UNIT_BYTES = {"M": 10**6, "G": 10**9}


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Where the engines go  [default: beside the model]"
)
@click.option(
    "--for", "capabilities", metavar="LIST", default="",
    help="Compute capabilities, an engine for each, such as sm86,sm120  [default: the GPU here, or with TensorRT-RTX all that it builds for]",
)  # fmt: skip
@click.option(
    "--batch",
    default="1",
    metavar="SIZES",
    help="Sizes of free dimensions: least,usual,most, or one size for all.  [default: 1]",
)
@click.option(
    "--size", "sizes", multiple=True, metavar="INPUT=SHAPES",
    help="The shapes of one input with free dimensions, least,usual,most: image=1x3x224x224,8x3x224x224,16x3x224x224.",
)  # fmt: skip
@click.option("--level", type=click.IntRange(0, 5), help="How hard the builder tries: more takes longer, and runs faster.")
@click.option("--workspace", metavar="SIZE", help="What kernels may take of the GPU's memory, such as 512M or 2G.")
@click.option("--memory", metavar="SIZE", help="What building may take of this machine's memory, such as 8G.")
@click.option("--timeout", callback=duration, default="1h", show_default=True, help="How long one engine may take.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where engines are kept  [default: ~/.cache/edge-fleet/engines]",
)
@with_json
@reports_errors
def build(
    model: Path, out: Path | None, capabilities: str, batch: str, sizes: tuple[str, ...], level: int | None, workspace: str | None,
    memory: str | None, timeout: float, cache: Path | None, *, as_json: bool,
) -> None:  # fmt: skip
    """Builds TensorRT engines from an ONNX model, for a release to carry.

    Needs a TensorRT library: `pip install 'edge-inference-agent[tensorrt-rtx]'` builds without a GPU. An engine that was built before from the same
    model, with the same library and options, is taken from the cache, so a build that was interrupted goes on with the one that it had come
    to. What cannot be built is told with the node and what to change; the others are built all the same, and the exit code is 1.

    edge-fleet build digits.onnx --for sm86,sm89,sm120 --batch 1,8,32

    edge-fleet build detector.onnx --size image=1x3x320x320,1x3x640x640,4x3x640x640
    """
    from runtimes.tensorrt.engines import Builder, Limits

    limits = Limits(timeout, _bytes(memory, "--memory"))
    builder = Builder(cache or _cache(), limits)
    profiles = dict(_profile(text) for text in sizes)
    orders = _orders(model, _capabilities(capabilities), _batch(batch), profiles, level, _bytes(workspace, "--workspace"))
    found = [_build(builder, order, out or model.parent, quiet=as_json) for order in orders]
    show(found, as_json, _table)
    if any("refused" in one for one in found):
        sys.exit(EXIT_FAILED)


def _orders(
    model: Path, capabilities: list[str], batch: tuple[int, int, int], profiles: dict[str, Profile], level: int | None,
    workspace: int | None,
) -> list[Order]:  # fmt: skip
    from runtimes.tensorrt.order import Order

    return [Order(model.resolve(), one, batch, profiles, level, workspace) for one in capabilities]


def _build(builder: Builder, order: Order, out: Path, *, quiet: bool) -> dict[str, Any]:
    from runtimes.contract import RuntimeFailure
    from runtimes.tensorrt.engines import Refused

    named = order.capability or "the GPU here"
    try:
        with _shown(f"{order.model.name} for {named}", quiet=quiet) as progress:
            engine = builder.build(order, progress)
    except Refused as refused:
        return {"for": order.capability or None, "refused": str(refused)}
    except RuntimeFailure as error:
        raise Invalid(str(error)) from error
    return _kept(engine, order, out)


def _kept(engine: Engine, order: Order, out: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".".join(filter(None, (order.model.stem, order.capability, "engine")))
    new = path.with_name(f".{path.name}.new")
    shutil.copyfile(engine.path, new)
    new.replace(path)
    return {
        "for": order.capability or None, "capabilities": list(engine.capabilities), "file": str(path), "bytes": path.stat().st_size, "seconds": round(engine.seconds, 2),
        "kept": engine.kept, "library": f"{engine.library.name} {engine.library.version}",
    }  # fmt: skip


def _table(found: list[dict[str, Any]]) -> None:
    for one in found:
        if "refused" in one:
            click.echo(f"{one['for'] or 'the GPU here'}: refused: {one['refused']}", err=True)
            continue
        named = ", ".join(one["capabilities"]) or one["for"] or "this GPU"
        how = "built before" if one["kept"] else f"built in {one['seconds']} s"
        click.echo(f"{named}: {one['file']}  {one['bytes'] / 1e3:.0f} KB, {how} with {one['library']}")


@contextmanager
def _shown(what: str, *, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr with the phase that the builder is in."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[phase]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bars:
        task = bars.add_task(tables.safe(what), total=None, phase="")
        yield lambda phase, done, of: bars.update(task, completed=done, total=of or None, phase=tables.safe(phase))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-fleet" / "engines"


def _capabilities(text: str) -> list[str]:
    """The compute capabilities in `text`; the empty one, of the GPU that is here, when there are none.  Raises: Invalid."""
    found = [part.strip().lower() for part in text.split(",") if part.strip()]
    for one in found:
        if not _CAPABILITY.fullmatch(one):
            raise Invalid(f"--for {one!r} is not a compute capability; write for example sm86,sm120")
    return list(dict.fromkeys(found)) or [""]


def _batch(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) not in {1, 3} or not all(part.strip().isdigit() for part in parts):
        raise Invalid(f"--batch {text!r} is neither one size nor three (least,usual,most); write for example 1,8,32")
    sizes = [int(part) for part in parts] * (1 if len(parts) == 3 else 3)
    return (sizes[0], sizes[1], sizes[2])


def _profile(text: str) -> tuple[str, Profile]:
    from runtimes.tensorrt.order import Profile

    name, _, said = text.rpartition("=")
    shapes = [part.strip() for part in said.split(",")]
    if not name or len(shapes) not in {1, 3} or not all(_SHAPE.fullmatch(one) for one in shapes):
        raise Invalid(
            f"--size {text!r} is not INPUT=LEAST,USUAL,MOST; write for example image=1x3x224x224,8x3x224x224,16x3x224x224"
        )
    sizes = [tuple(int(size) for size in one.split("x")) for one in shapes] * (1 if len(shapes) == 3 else 3)
    return name, Profile(*sizes)


def _bytes(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    found = _MEMORY.fullmatch(text)
    if found is None or not int(found[1]):
        raise Invalid(f"{option} {text!r} is not a size; write for example 512M or 8G")
    return int(found[1]) * _UNIT_BYTES[found[2].upper()]
