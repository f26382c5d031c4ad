"""A JPEG or PNG as the input that a release declares it to become. Data decides, never code."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from agent.contract.manifest import Picture
from agent.serving.allowance import Allowance
from agent.serving.answers import Refusal
from runtimes.contract import Array, TensorSpec

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000  # the largest cameras; a file of a few kilobytes can unpack to far more
PIXEL_BYTES, COEFFICIENT_BYTES = 4, 6
MAX_DECODED_BYTES = 256 * 1024 * 1024
MODES = {"rgb": "RGB", "bgr": "RGB", "gray": "L"}


def read(data: Any, picture: Picture, spec: TensorSpec, allowance: Allowance | None = None) -> Array:
    """The input that the file becomes.  Raises: Refusal (400; 413; 503 while others take the memory that it needs)."""
    image = _opened(data, picture, allowance or Allowance())
    pixels = np.asarray(_fitted(image, picture))
    if picture.color == "gray":
        pixels = pixels[:, :, np.newaxis]
    elif picture.color == "bgr":
        pixels = pixels[:, :, ::-1]
    values = _numbers(pixels, picture, spec)
    if picture.layout == "nchw":
        values = values.transpose(2, 0, 1)
    return np.ascontiguousarray(values[np.newaxis])


def _opened(data: Any, picture: Picture, allowance: Allowance) -> Any:
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
    whole = image.width * image.height
    try:
        image.draft(
            MODES[picture.color], (2 * picture.width, 2 * picture.height)
        )  # a JPEG's decoder can shrink by powers of two
        seen_through = "A" in image.getbands() or "transparency" in image.info
        _take(allowance, image, whole, copies=4 if seen_through else 2)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # 16 bits per pixel: the library would cut instead of scale
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        if seen_through:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return image.convert(MODES[picture.color])
    except (MemoryError, Refusal):
        raise
    except Exception as error:  # decoders raise whatever their format makes them
        raise Refusal(400, f"the {image.format or 'picture'} cannot be decoded: {error}") from error


def _take(allowance: Allowance, image: Any, whole: int, *, copies: int) -> None:
    """The memory that decoding takes: `copies` of the picture, whose pixels have four bytes when they have colours; and a
    progressive JPEG has all `whole` pixels' coefficients before the first of them.  Raises: Refusal (413, 503).
    """
    size = image.width * image.height * PIXEL_BYTES * copies
    if image.info.get("progressive") or image.info.get("progression"):
        size += whole * COEFFICIENT_BYTES
    if size > MAX_DECODED_BYTES:
        raise Refusal(
            413, f"the picture takes {size} bytes to decode, at most {MAX_DECODED_BYTES} are allowed: send a smaller one"
        )
    allowance.charge(size)


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
