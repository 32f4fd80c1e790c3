"""Pictures of every form become the bytes of a file, and bad ones one line with a way out."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from trl.data import picture_files
from trl.data.picture_files import is_animated, open_picture, pictures_in, read_picture

WHERE = "picture 0 of column 'images'"


def pixels(height=4, width=6):
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def saved(image, form="PNG", **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def seen(value):
    return np.asarray(open_picture(read_picture(value, WHERE)))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width, height):
    """A PNG that says how large it is and has no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    return start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PNG = saved(Image.fromarray(pixels()))
CODE = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        bytearray(PNG),
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "gone.png"},
        f"data:image/png;base64,{CODE}",
        f"data:image/png;charset=utf-8;base64,{CODE}",
        CODE,
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{CODE}", "detail": "auto"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{CODE}"},
        {"type": "image", "base64": CODE},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": CODE}},
        {"type": "image", "image": {"bytes": PNG, "path": None}, "text": None},
    ],
)
def test_bytes_stay_as_they_are(value):
    assert read_picture(value, WHERE) == PNG


def test_paths_of_every_kind(tmp_path, monkeypatch):
    (tmp_path / "a b.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a b.png"
    for value in (path, str(path), "a b.png", path.as_uri(), {"path": str(path)}, {"bytes": None, "path": str(path)}):
        assert read_picture(value, WHERE) == PNG


@pytest.mark.parametrize(
    "value",
    [
        Image.fromarray(pixels()),
        pixels(),
        pixels().tolist(),
        pixels() / np.float32(255),
        pixels().astype(np.float64),
        torch.tensor(pixels()),
        torch.tensor(pixels()).permute(2, 0, 1),
        (torch.tensor(pixels()) / 255).bfloat16().float(),
        (pixels().astype(np.uint16) + 178) * 257 - 178 * 257,
    ],
)
def test_pixels_become_a_png(value):
    content = read_picture(value, WHERE)
    assert content.startswith(b"\x89PNG")
    assert np.abs(seen(value).astype(int) - pixels()).max() <= int(isinstance(value, torch.Tensor))


def test_grey_and_transparent_pixels():
    grey = np.array([[0, 7], [8, 255]], dtype=np.uint8)
    for value in (grey, grey[..., None], grey.tolist()):
        assert (seen(value) == grey[..., None]).all()
    clear = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    assert seen(clear).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    mask = np.array([[True, False]])
    assert seen(mask)[..., 0].tolist() == [[255, 0]]


def test_other_modes_are_seen_in_rgb():
    red = Image.new("RGB", (2, 2), (254, 0, 0))
    for form in ("CMYK", "P", "HSV", "RGBA", "RGBX"):
        assert np.abs(seen(red.convert(form)).astype(int)[0, 0] - (254, 0, 0)).max() <= 2, form
    assert np.abs(seen(saved(red.convert("CMYK"), "JPEG"))[0, 0].astype(int) - (254, 0, 0)).max() <= 2
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert seen(palette).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled():
    wide = Image.fromarray(np.array([[0, 257, 40 * 257, 65535]], dtype=np.uint16))
    for value in (wide, saved(wide), saved(wide, "TIFF")):
        assert seen(value)[0, :, 0].tolist() == [0, 1, 40, 255]
    assert seen(Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32)))[0, :, 0].tolist() == [0, 51, 255]


def test_pictures_stand_upright():
    image = Image.fromarray(pixels(4, 6))
    exif = image.getexif()
    exif[0x0112] = 6
    turned = saved(image, exif=exif)
    assert read_picture(turned, WHERE) == turned
    assert seen(turned).shape == (6, 4, 3)
    assert (seen(turned) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))).all()
    assert (seen(Image.open(io.BytesIO(turned))) == seen(turned)).all()


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_seen(form):
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    content = saved(first, form, save_all=True, append_images=[second], lossless=True)
    assert is_animated(content)
    assert np.abs(seen(content)[0, 0].astype(int) - (255, 0, 0)).max() <= 1
    assert not is_animated(saved(first, form))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (PNG[:50], "cannot be decoded (image file is truncated): copy the file again"),
        (saved(Image.fromarray(pixels(40, 40)), "JPEG")[:-300], "cannot be decoded (image file is truncated"),
        (b"", "is empty: it has 0 bytes"),
        (b"hello, world", "is no picture that can be read: its 12 bytes begin with b'hello, world'"),
        (b"<!DOCTYPE html><html>", "is a web page: download the picture itself"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS: run `git lfs pull`"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture that can be read"),
        (header(0, 5), "has 0 x 5 pixels: take it out"),
        (header(9000, 8000), "has 9,000 x 8,000 pixels, more than 64,000,000: make it smaller, or raise"),
        (header(60000, 60000), "is too large (Image size (3600000000 pixels) exceeds limit"),
        (Image.new("RGB", (0, 3)), "has 0 x 3 pixels: take it out"),
        (np.zeros((0, 3, 3), np.uint8), "has the shape [0, 3, 3], so no pixel"),
        (np.zeros((5, 4, 2), np.uint8), "has the shape [5, 4, 2]: pixels are [height, width]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "has the shape [2, 4, 4, 3]: pixels are [height, width]"),
        (np.full((2, 2), -0.5), "has pixels from -0.5 to -0.5: scale them"),
        (np.full((2, 2), np.nan), "has pixels from nan to nan: scale them"),
        (np.full((2, 2), 70000), "has pixels from 70000 to 70000: scale them"),
        ([[1, 2], [3]], "is no array of pixels"),
        ([["a"]], "give a PIL image, bytes, a path"),
        ([], "has the shape [0]: pixels are"),
        (None, "is None: give a PIL image, bytes, a path, a data URL"),
        (7, "is 7: give a PIL image"),
        ("", "is an empty text: give"),
        ("https://example.org/a.png", "is the address 'https://example.org/a.png': nothing is fetched while training"),
        ("s3://bucket/a.png", "is the address 's3://bucket/a.png': nothing is fetched while training"),
        ("nowhere.png", "is the file 'nowhere.png', which does not exist (paths begin at the working directory"),
        ("/nowhere/a.png", "is the file '/nowhere/a.png', which does not exist: correct the path"),
        ("/tmp", "is '/tmp', which is no file"),
        ("a\0b", r"is the file 'a\x00b', which does not exist"),
        ("data:image/png", "is the data URL 'data:image/png' without a comma"),
        ("data:image/png;base64,@@@", "is not base64"),
        ({"bytes": None, "path": None}, "is a dict with none of 'image'"),
        ({"url": "a.png", "path": "b.png"}, "is a dict with two of 'url', 'path'"),
    ],
)
def test_bad_pictures_are_one_line(value, says):
    with pytest.raises(ValueError) as error:
        read_picture(value, WHERE)
    text = str(error.value)
    assert text.startswith(WHERE)
    assert says in text
    assert "\n" not in text


def test_the_limit_is_a_setting(monkeypatch):
    monkeypatch.setattr(picture_files, "MOST_PIXELS", 23)
    for value in (PNG, pixels(), Image.fromarray(pixels())):
        with pytest.raises(ValueError, match="has 6 x 4 pixels, more than 23"):
            read_picture(value, WHERE)
    monkeypatch.setattr(picture_files, "MOST_PIXELS", 24)
    assert read_picture(PNG, WHERE) == PNG


def test_pictures_of_a_column():
    image, other = Image.fromarray(pixels()), {"bytes": PNG, "path": None}
    assert pictures_in(None, "images") == pictures_in([], "images") == []
    assert pictures_in(image, "image") == [image]
    assert pictures_in(other, "image") == [other]
    assert pictures_in("a.png", "image") == ["a.png"]
    assert pictures_in([image, other], "images") == [image, other]
    assert pictures_in([[image], [other, image]], "images") == [image, other, image]
    assert pictures_in([image, None], "images") == [image, None]
    assert len(pictures_in(pixels(), "image")) == len(pictures_in(pixels().tolist(), "image")) == 1
    assert len(pictures_in([pixels(), pixels()], "images")) == 2
    assert len(pictures_in([pixels().tolist()] * 2, "images")) == 2
    assert len(pictures_in(np.stack([pixels()] * 5), "images")) == 5
    assert len(pictures_in([[[1, 2], [3, 4]]] * 5, "images")) == 5
