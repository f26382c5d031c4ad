"""A JPEG or PNG as the input that a release declares it to become. Data decides, never code."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.contract.manifest import Picture
from agent.serving.answers import Refusal
from runtimes.contract import Array, Model, ModelInvalid, RuntimeUnavailable, TensorSpec

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000  # the largest cameras; a file of a few kilobytes can unpack to far more
MODES = {"rgb": "RGB", "bgr": "RGB", "gray": "L"}
INSTALL = "install it with: pip install 'edge-inference-agent[images]'"


def check(picture: Picture, model: Model) -> None:
    """Whether the model fits what its release says about pictures, and the library is here.

    Raises: ModelInvalid, RuntimeUnavailable.
    """
    try:
        import PIL.Image  # noqa: F401 - loaded now, so that the first request does not wait for it
    except ImportError as error:
        raise RuntimeUnavailable(f"pictures need Pillow, which cannot be imported ({error}); {INSTALL}") from error
    spec = named(picture.input, model.inputs, "input")
    if spec.datatype in ("BOOL", "BYTES", "BF16") or len(spec.shape) != 4:
        raise ModelInvalid(
            f"input {spec.name!r} is {spec.datatype} of {len(spec.shape)} dimensions: a picture needs 4, of numbers"
        )
    wanted = _shape(picture)
    if any(declared not in (-1, size) for declared, size in zip(spec.shape, wanted, strict=True)):
        raise ModelInvalid(
            f"pictures are declared to become {list(wanted)}, but input {spec.name!r} has shape {list(spec.shape)}"
        )
    if len(model.inputs) != 1:
        raise ModelInvalid(f"pictures are for models with one input; this one has {len(model.inputs)}")
    output = named(picture.output, model.outputs, "output")
    if output.datatype in ("BOOL", "BYTES"):
        raise ModelInvalid(f"output {output.name!r} is {output.datatype}: labels need numbers")


def named(name: str, specs: Sequence[TensorSpec], role: str) -> TensorSpec:
    """The tensor called `name`; the only one when it is empty.  Raises: ModelInvalid."""
    found = [spec for spec in specs if spec.name == name or (not name and len(specs) == 1)]
    if not found:
        known = ", ".join(repr(spec.name) for spec in specs)
        raise ModelInvalid(f"pictures name {role} {name!r}, the model has {known}")
    return found[0]


def _shape(picture: Picture) -> tuple[int, int, int, int]:
    channels = 1 if picture.color == "gray" else 3
    if picture.layout == "nchw":
        return (1, channels, picture.height, picture.width)
    return (1, picture.height, picture.width, channels)


def read(data: Any, picture: Picture, spec: TensorSpec) -> Array:
    """The input that the file becomes.  Raises: Refusal (400, 413)."""
    image = _opened(data, picture)
    pixels = np.asarray(_fitted(image, picture))
    if picture.color == "gray":
        pixels = pixels[:, :, np.newaxis]
    elif picture.color == "bgr":
        pixels = pixels[:, :, ::-1]
    values = _numbers(pixels, picture, spec)
    if picture.layout == "nchw":
        values = values.transpose(2, 0, 1)
    return np.ascontiguousarray(values[np.newaxis])


def _opened(data: Any, picture: Picture) -> Any:
    """The upright picture in the wanted colours.  Raises: Refusal."""
    from PIL import Image, ImageOps

    try:
        image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"the picture has too many pixels: {error}") from error
    except Exception as error:
        raise Refusal(400, "the body is not a JPEG or PNG file") from error
    if image.width * image.height > MAX_PIXELS:
        raise Refusal(
            413, f"the picture has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are allowed: send a smaller one"
        )
    try:
        image.draft(
            MODES[picture.color], (2 * picture.width, 2 * picture.height)
        )  # a JPEG's decoder can shrink by powers of two
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # 16 bits per pixel: the library would cut instead of scale
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return image.convert(MODES[picture.color])
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever their format makes them
        raise Refusal(400, f"the {image.format or 'picture'} cannot be decoded: {error}") from error


def _fitted(image: Any, picture: Picture) -> Any:
    from PIL import Image, ImageOps

    size, method = (picture.width, picture.height), Image.Resampling[picture.filter.upper()]
    if picture.fit == "stretch":
        return image.resize(size, method)
    if picture.fit == "cover":
        return ImageOps.fit(image, size, method)
    fill = picture.fill if picture.color == "gray" else (picture.fill,) * 3
    return ImageOps.pad(image, size, method, color=fill)


def _numbers(pixels: Array, picture: Picture, spec: TensorSpec) -> Array:
    """(pixel * scale - mean) / std per channel, in the input's type; a quantized input is quantized with its own parameters."""
    if spec.dtype.kind != "f" and not picture.normalises:
        return pixels.astype(spec.dtype)
    values = pixels.astype(np.float32) * np.float32(picture.scale)
    if picture.mean:
        values -= np.asarray(picture.mean, np.float32)
    if picture.std:
        values /= np.asarray(picture.std, np.float32)
    if spec.dtype.kind == "f":
        return values.astype(spec.dtype)
    if spec.quantization is not None and spec.quantization.axis is None:
        values = values / np.float32(spec.quantization.scales[0]) + spec.quantization.zero_points[0]
    limits = np.iinfo(spec.dtype)
    rounded: Array = np.clip(np.rint(values), limits.min, limits.max).astype(spec.dtype)
    return rounded
