"""From the bytes of a picture to the input that a release declares."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from agent.contract.manifest import Picture
from agent.serving.answers import Refusal
from agent.serving.api import pixels
from agent.variants import check_picture
from runtimes.contract import ModelInvalid, Quantization, TensorSpec

FLOATS = TensorSpec("x", "FP32", (-1, 3, 4, 4))
BYTES = TensorSpec("x", "UINT8", (-1, 4, 4, 3))
GRADIENT = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3) * 5


def encoded(array, kind="PNG", **options):
    memory = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(memory, kind, **options)
    return memory.getvalue()


def declared(**settings):
    return Picture(**{"width": 4, "height": 4, **settings})


def test_pixels_reach_an_input_of_whole_numbers_untouched():
    assert np.array_equal(pixels.read(encoded(GRADIENT), declared(layout="nhwc"), BYTES), GRADIENT[np.newaxis])


def test_layout_and_colour_order():
    planes = pixels.read(encoded(GRADIENT), declared(color="bgr"), FLOATS)
    assert planes.shape == (1, 3, 4, 4)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    assert np.array_equal(planes[0], GRADIENT[:, :, ::-1].transpose(2, 0, 1).astype(np.float32))


def test_normalisation():
    picture = declared(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = (GRADIENT / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(pixels.read(encoded(GRADIENT), picture, FLOATS)[0], expected.transpose(2, 0, 1), atol=1e-5)


def test_a_quantized_input_is_quantized_by_its_own_parameters():
    spec = TensorSpec("x", "INT8", (1, 4, 4, 3), Quantization((1 / 255,), (-128,)))
    read = pixels.read(encoded(GRADIENT), declared(layout="nhwc", scale=1 / 255), spec)
    assert np.array_equal(read[0], (GRADIENT.astype(int) - 128).astype(np.int8))


def test_grey():
    spec = TensorSpec("x", "FP32", (-1, 1, 8, 8))
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    read = pixels.read(encoded(grey), Picture(width=8, height=8, color="gray", scale=0.5), spec)
    assert np.array_equal(read[0, 0], grey * np.float32(0.5))


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_a_wide_picture_is_fitted(fit):
    """Left half black, right half white, twice as wide as high."""
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 40:] = 255
    read = pixels.read(encoded(wide), declared(width=8, height=8, fit=fit, fill=100, layout="nhwc", filter="nearest"), BYTES)[
        0, :, :, 0
    ]
    assert (read[3, 0], read[3, 7]) == (0, 255)
    assert read[0, 0] == (100 if fit == "contain" else 0)
    assert (read[:, :4] == 0).all() == (fit != "contain")


def test_a_turned_photo_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    read = pixels.read(encoded(GRADIENT, exif=exif), declared(layout="nhwc"), BYTES)
    assert np.array_equal(read[0], np.rot90(GRADIENT, -1))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GRADIENT).convert("P"),
        Image.fromarray(GRADIENT).convert("RGBA"),
        Image.fromarray(GRADIENT).convert("L"),
        Image.fromarray(GRADIENT).convert("1"),
        Image.fromarray(GRADIENT[:, :, 0].astype(np.uint16) << 8),
    ],
    ids=["palette", "alpha", "grey", "bits", "sixteen"],
)
def test_every_kind_of_png(image):
    assert pixels.read(encoded(image), declared(layout="nhwc"), BYTES).shape == (1, 4, 4, 3)


def test_what_is_transparent_is_black():
    clear = np.dstack([np.full((4, 4, 3), 200, np.uint8), np.zeros((4, 4), np.uint8)])
    assert not pixels.read(encoded(clear), declared(layout="nhwc"), BYTES).any()


def test_sixteen_bits_keep_the_high_ones():
    deep = np.full((4, 4), 0x80FF, np.uint16)
    assert (pixels.read(encoded(deep), declared(layout="nhwc"), BYTES) == 0x80).all()


def test_a_cmyk_jpeg():
    assert pixels.read(encoded(Image.fromarray(GRADIENT).convert("CMYK"), "JPEG"), declared(), FLOATS).shape == (1, 3, 4, 4)


def bomb():
    """A PNG of a few kilobytes that says it has 100 000 x 100 000 pixels."""
    import struct

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 400, "is not a JPEG or PNG"),
        (b"hello", 400, "is not a JPEG or PNG"),
        (encoded(GRADIENT, "GIF"), 400, "is not a JPEG or PNG"),
        (encoded(GRADIENT, "TIFF"), 400, "is not a JPEG or PNG"),
        (encoded(np.zeros((300, 300, 3), np.uint8), "JPEG")[:-200], 400, "cannot be decoded"),
        (encoded(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))[:9000], 400, "cannot be decoded"),
        (bomb(), 413, "pixels"),
    ],
    ids=["empty", "text", "gif", "tiff", "cut jpeg", "cut png", "bomb"],
)
def test_what_is_no_picture_is_refused(data, status, words):
    with pytest.raises(Refusal, match=words) as refused:
        pixels.read(data, declared(), FLOATS)
    assert refused.value.status == status


SCORES = TensorSpec("y", "FP32", (-1, 10))


class Model:
    def __init__(self, *inputs, outputs=(SCORES,)):
        self.inputs, self.outputs = inputs, outputs


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model(TensorSpec("x", "FP32", (-1, 3, 8, 8))), r"become \[1, 3, 4, 4\], but input 'x' has shape \[-1, 3, 8, 8\]"),
        (Model(TensorSpec("x", "FP32", (-1, 48))), "a picture needs 4"),
        (Model(TensorSpec("x", "BYTES", (1, 1, 1, 1))), "of numbers"),
        (Model(FLOATS, FLOATS), "pictures name input ''"),
        (Model(FLOATS, outputs=(TensorSpec("y", "BYTES", (1,)),)), "labels need numbers"),
    ],
)
def test_a_model_that_takes_no_such_pictures_is_refused_when_it_is_loaded(model, words):
    with pytest.raises(ModelInvalid, match=words):
        check_picture(model, declared())


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 0},
        {"mean": (1.0,)},
        {"std": (1.0, 0.0, 1.0)},
        {"fill": 300},
        {"color": "gray", "mean": (1.0, 2.0, 3.0)},
        {"scale": 0.0},
    ],
)
def test_a_declaration_without_sense_is_none(settings):
    with pytest.raises(ValueError, match="of a picture"):
        declared(**settings)
