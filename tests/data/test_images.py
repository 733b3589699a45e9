"""Every image file takes the same steps: first picture, upright, white background, RGB, size."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from cifar_fast import InputError, load_dataset
from cifar_fast.data import images
from cifar_fast.data.images import as_images, decode_image

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "MPO", "AVIF")
TURNED = {  # the pixels that a camera stores for each value of the EXIF orientation
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels),
    7: lambda pixels: np.rot90(pixels.swapaxes(0, 1), 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


def saved(image, kind, orientation=1, **how):
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {
        "WEBP": dict(lossless=True),
        "JPEG": dict(quality=100, subsampling=0),
        "MPO": dict(quality=100, subsampling=0, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
        "AVIF": dict(quality=100, subsampling="4:4:4"),
    }
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **more.get(kind, {}) | how)
    file.seek(0)
    return file


def quadrants(size=32, mode="RGB"):
    """Return an image with another color in each quarter, so that each turn and mirror image differs."""
    colors = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [90, 90, 0]]], np.uint8)
    return Image.fromarray(colors.repeat(size // 2, 0).repeat(size // 2, 1)).convert(mode)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("kind", FORMATS)
def test_photos_of_each_format_and_orientation_are_upright(kind, size):
    upright = np.asarray(quadrants(size))
    for orientation, turn in TURNED.items():
        file = saved(Image.fromarray(np.ascontiguousarray(turn(upright))), kind, orientation)
        pixels, resized = decode_image(file, "x", resize=True)
        assert resized == (size != 32)
        assert np.abs(pixels[8::16, 8::16].astype(int) - np.asarray(quadrants())[8::16, 8::16]).max() < 8, orientation


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("TIFF", mode) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        ("JPEG", "CMYK"),
    ],
)
def test_each_mode_has_the_pixels_of_pillow_upright(kind, mode, orientation):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8)).convert(mode)
    pixels, _ = decode_image(saved(image, kind, orientation), "x")
    file = saved(image, kind, orientation)
    assert np.array_equal(pixels, np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "value"),
    [("RGBA", (9, 9, 9, 0)), ("LA", (9, 0)), ("1", 0), ("L", 0), ("RGB", (0, 0, 0)), ("P", 0)],
)
@pytest.mark.parametrize("size", [(32, 32), (60, 40)])
def test_transparent_images_of_each_mode_are_white(mode, value, size):
    """The last three have one transparent color. A camera's orientation does not bring the hidden color back."""
    image = Image.new(mode, size, value)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    file = saved(image, "PNG", 6, **{} if mode.endswith("A") else {"transparency": value})
    assert (decode_image(file, "x", resize=True)[0] == 255).all()


def test_photo_with_a_second_picture_gives_the_first(tmp_path):
    for split in ("train", "test"):
        for name, color in (("ant", "blue"), ("bee", "lime")):
            (tmp_path / f"set/{split}/{name}").mkdir(parents=True)
            file = saved(Image.new("RGB", (32, 32), color), "MPO")
            assert Image.open(file).n_frames == 2
            (tmp_path / f"set/{split}/{name}/photo.jpg").write_bytes(file.getvalue())
            (tmp_path / f"set/{split}/{name}/photo.mpo").write_bytes(file.getvalue())
    dataset = load_dataset("folder", tmp_path / "set", log=None)
    assert len(dataset.train_images) == 4
    assert np.abs(dataset.train_images[0, 0, 0].astype(int) - [0, 0, 255]).max() < 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\0"])
def test_damaged_exif_data_costs_no_image(kind, exif):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(file, kind, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (decode_image(io.BytesIO(file.getvalue()), "x")[0] == 255).all()


def test_very_large_photos_are_decoded(monkeypatch):
    """Pillow warns above its limit, and refuses twice as many pixels. Its limit is as before afterwards."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (64, 100):
            assert decode_image(saved(quadrants(size), "PNG"), "x", resize=True)[1]
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(images, "MAX_PIXELS", 9999)
    with pytest.raises(InputError, match=r"^x: 100 x 100 pixels are more than the 9,999 that are decoded; scale it"):
        decode_image(saved(quadrants(100), "PNG"), "x", resize=True)


def test_too_little_memory_is_not_called_damage(monkeypatch):
    def exhausted(image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    with pytest.raises(InputError, match=r"^x: too large for the memory of this machine; scale it down$"):
        decode_image(saved(quadrants(), "PNG"), "x")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("I;16", (32, 32)), "mode I;16; images must have 8 bits per channel"),
        (Image.new("F", (32, 32)), "mode F; images must have 8 bits per channel"),
        (Image.new("LAB", (32, 32)), r"mode LAB; .* in gray, RGB, CMYK or YCbCr"),
        (Image.new("RGB", (28, 28)), "28 x 28 pixels; images must be 32 x 32, or give resize 32"),
    ],
)
def test_other_images_are_refused_with_the_reason(image, words):
    with pytest.raises(InputError, match=words):
        decode_image(saved(image, "TIFF"), "x")


def test_file_in_an_unknown_format_is_named():
    with pytest.raises(InputError, match=r"x: not a whole image in a format that is read \(PNG, .*; convert it to"):
        decode_image(io.BytesIO(b"\0\0\0\x18ftypheic"), "x")


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICO"])
def test_formats_that_are_not_listed_are_not_decoded_whatever_the_name(tmp_path, kind):
    """Pillow starts Ghostscript for EPS."""
    quadrants().save(tmp_path / "x.png", kind)
    with pytest.raises(InputError, match="x: not a whole image in a format that is read"):
        decode_image(tmp_path / "x.png", "x")


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    def refuse(image):
        raise AssertionError("decoded")

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 6, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    with pytest.raises(InputError, match="20000 x 10000 pixels are more than the 120,000,000 that are decoded"):
        decode_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks), "x", resize=True)


@pytest.mark.parametrize(
    "shape", [(5, 28, 28), (5, 28, 28, 1), (5, 28, 28, 3), (5, 64, 96, 3), (5, 32, 32), (40, 30, 3)]
)
def test_arrays_take_the_steps_of_files(shape):
    array = np.random.RandomState(0).randint(0, 256, shape, np.uint8)
    pixels, resized = as_images("x", array, resize=True)
    assert resized == (0 if shape == (5, 32, 32) else len(pixels))
    for one, expected in zip([array] if shape[-1] == 3 and len(shape) == 3 else array, pixels, strict=True):
        file = saved(Image.fromarray(one.squeeze()), "PNG")
        assert np.array_equal(decode_image(file, "x", resize=True)[0], expected)
