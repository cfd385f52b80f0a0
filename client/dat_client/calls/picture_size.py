"""Reads the size in pixels of an encoded picture from its first bytes, without decoding it."""

from __future__ import annotations

import struct

_NO_FRAME = (0xC4, 0xC8, 0xCC)  # of the markers 0xC0..0xCF, those that do not begin a frame (ITU T.81, table B.1)


def picture_pixels(picture: bytes) -> int | None:
    """Returns the number of pixels of a JPEG, PNG or WebP file; None if its header cannot be read.

    >>> picture_pixels(b"\\x89PNG\\r\\n\\x1a\\n" + b"\\0\\0\\0\\rIHDR" + struct.pack(">II", 640, 480))
    307200
    """
    try:
        if picture.startswith(b"\x89PNG"):
            width, height = struct.unpack_from(">II", picture, 16)
        elif picture.startswith(b"RIFF"):
            width, height = _webp_size(picture)
        else:
            width, height = _jpeg_size(picture)
    except (struct.error, ValueError, IndexError):
        return None
    return width * height or None


def _jpeg_size(picture: bytes) -> tuple[int, int]:
    at = 2
    while True:
        at = picture.index(b"\xff", at)
        while picture[at] == 0xFF:  # a marker may be preceded by any number of these
            at += 1
        marker = picture[at]
        length, height, width = struct.unpack_from(">HxHH", picture, at + 1)
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return width, height
        at += 1 + length


def _webp_size(picture: bytes) -> tuple[int, int]:
    kind = picture[12:16]
    if kind == b"VP8X":
        return int.from_bytes(picture[24:27], "little") + 1, int.from_bytes(picture[27:30], "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", picture, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", picture, 26)
    return width & 0x3FFF, height & 0x3FFF
