"""A picture becomes the same pixels wherever it is read."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dat_client.dataset_format.pictures import (
    PNG_SIGNATURE,
    TooManyPixels,
    UnusualPixels,
    decode,
    orientation,
    orientation_exif,
    without_texts,
)

VALUES = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), dtype=np.uint16)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def sixteen_bit_png(colour_type: int, values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow writes in grey only; `values` is [H,W,channels]."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    height, width, _ = values.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour_type, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(chunks)


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(VALUES), "PNG"),
        saved(Image.fromarray(VALUES), "TIFF"),
        saved(Image.frombytes("I;16B", (30, 20), VALUES.astype(">u2").tobytes()), "TIFF"),
        b"P5 30 20 65535\n" + VALUES.astype(">u2").tobytes(),
        sixteen_bit_png(2, np.stack([VALUES] * 3, axis=2)),
        sixteen_bit_png(4, np.stack([VALUES, np.full_like(VALUES, 65535)], axis=2)),
    ],
    ids=["png", "tiff", "tiff-big-endian", "pgm", "png-rgb", "png-grey-alpha"],
)
def test_sixteen_bits_become_their_high_byte_in_grey_and_in_colour(content: bytes) -> None:
    expected = (VALUES >> 8).astype(np.uint8)
    assert np.array_equal(np.asarray(decode(content)), np.stack([expected] * 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(UnusualPixels, match=f"'{mode}', 32-bit numbers; save it with 8 or 16 bits a channel"):
        decode(saved(Image.new(mode, (8, 8)), "TIFF"))


def test_palettes_with_transparency_lose_only_the_transparency() -> None:
    image = Image.fromarray((VALUES >> 8).astype(np.uint8)).quantize(8)
    content = saved(image, "PNG", transparency=bytes(range(8)))
    assert np.array_equal(np.asarray(decode(content)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_a_png_with_a_large_text_or_profile_is_read(kind: str) -> None:
    image = Image.fromarray((VALUES >> 8).astype(np.uint8)).convert("RGB")
    info = PngImagePlugin.PngInfo()
    options: dict[str, object] = {"icc_profile": bytes(3_000_000)} if kind == "iCCP" else {"pnginfo": info}
    if kind == "zTXt":
        info.add_text("comment", "x" * 3_000_000, zip=True)
    elif kind == "iTXt":
        info.add_itxt("comment", "x" * 3_000_000, zip=True)
    content = saved(image, "PNG", exif=orientation_exif(6), **options)
    with pytest.raises(ValueError, match="Decompressed data too large"):
        Image.open(io.BytesIO(content)).load()
    picture = decode(content)
    assert np.array_equal(np.asarray(picture), np.asarray(image))
    assert orientation(picture) == 6
    assert kind.encode() not in without_texts(content)


def test_other_damage_of_a_png_stays_an_error_and_nothing_is_copied_from_other_files() -> None:
    content = saved(Image.new("RGB", (64, 64)), "PNG")
    with pytest.raises(Exception, match="truncated"):
        decode(content[:-40])
    assert without_texts(b"\xff\xd8\xff\xe0") == b"\xff\xd8\xff\xe0"
    assert without_texts(content[:-6]) == content[:-6]


def test_the_size_is_checked_before_a_pixel_is_decoded() -> None:
    content = saved(Image.new("L", (300, 200)), "PNG")[:60]  # no pixel is left
    with pytest.raises(TooManyPixels, match="300x200 = 60000 pixels, at most 50000"):
        decode(content, max_pixels=50_000)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", [1, 3, 6, 8])
def test_pixels_are_as_stored_with_their_tag_or_upright_without(form: str, value: int) -> None:
    image = Image.new("RGB", (40, 24), (200, 30, 30))
    image.paste((30, 30, 200), (0, 0, 20, 24))
    content = saved(image, form, exif=orientation_exif(value) or b"")
    stored, turned = decode(content), decode(content, upright=True)
    assert (stored.size, orientation(stored), orientation(turned)) == ((40, 24), value, 1)
    by_torchvision = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(np.asarray(stored), by_torchvision)
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[value]  # quarter turns counter-clockwise (EXIF 2.3, table of tag 274)
    assert np.array_equal(np.asarray(turned), np.rot90(by_torchvision, turns))


def test_tiff_is_upright_in_either_case_as_pillow_has_it() -> None:
    content = saved(Image.new("RGB", (40, 24)), "TIFF", exif=orientation_exif(6))
    for upright in (False, True):
        picture = decode(content, upright=upright)
        assert (picture.size, orientation(picture)) == ((24, 40), 1)


def test_damaged_exif_data_do_not_count() -> None:
    content = saved(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*damaged")
    assert orientation(decode(content)) == orientation(decode(content, upright=True)) == 1
    assert [orientation_exif(value) for value in (0, 1, 9)] == [None] * 3
