"""Pictures in files and shards, and as bytes: JPEG, PNG, WebP, their size checked before a pixel is decoded."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dat_workers.errors import InvalidInput, TooLarge

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 27  # where the caller sets no limit; Pillow has its own a little above
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # inside scikit-image
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def open_picture(data: bytes, *, field: str, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Image.Image:
    """One encoded picture as RGB; `upright` obeys the EXIF orientation.

    Raises TooLarge from the header alone where it announces more than `max_pixels`, InvalidInput where the
    bytes are no whole picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit below is ours
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise TooLarge(field, f"{width}x{height} = {width * height} pixels", f"at most {max_pixels} pixels")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise InvalidInput(field, f"mode {image.mode}", "8 bits a channel")
            if upright:
                image = ImageOps.exif_transpose(image)
            return image.convert("RGB")
    except InvalidInput:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise TooLarge(field, f"{len(data)} bytes ({error})", f"at most {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = f"{len(data)} bytes ({type(error).__name__}: {error})"
        raise InvalidInput(field, reason, "a whole JPEG, PNG or WebP picture") from error


def decode_picture(
    data: bytes, *, field: str, max_pixels: int = MAX_PIXELS, upright: bool = False
) -> npt.NDArray[np.uint8]:
    """uint8 [3,H,W] of one encoded picture; as `open_picture`."""
    return pixels(open_picture(data, field=field, max_pixels=max_pixels, upright=upright))


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [3,H,W] of an RGB picture."""
    return np.stack([np.asarray(band) for band in image.split()])


def as_image(picture: npt.NDArray[Any]) -> Image.Image:
    """An RGB picture of uint8 [3,H,W]. Pillow joins channels 17 times as fast as numpy turns the axes."""
    return Image.merge("RGB", [Image.fromarray(channel) for channel in picture])


def decode_pictures(encoded: Iterable[bytes], *, max_image_pixels: int, max_pixels: int) -> npt.NDArray[np.uint8]:
    """uint8 [N,3,H,W] of N encoded pictures of one size. Raises InvalidInput where sizes differ."""
    pictures: list[npt.NDArray[np.uint8]] = []
    left = max_pixels
    for i, data in enumerate(encoded):
        picture = decode_picture(data, max_pixels=min(max_image_pixels, left), field=f"images[{i}]")
        if pictures and picture.shape != pictures[0].shape:
            first, other = pictures[0].shape, picture.shape
            raise InvalidInput(
                f"images[{i}]",
                f"{other[2]}x{other[1]} pixels",
                f"{first[2]}x{first[1]}, the size of images[0]",
            )
        left -= picture.shape[1] * picture.shape[2]
        pictures.append(picture)
    return np.stack(pictures)


def encode_png(picture: npt.NDArray[Any]) -> bytes:
    """PNG bytes of uint8 [3,H,W]."""
    out = io.BytesIO()
    as_image(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()


def encode_jpeg(picture: npt.NDArray[Any], quality: int) -> bytes:
    """JPEG bytes of uint8 [3,H,W], in 4:4:4.

    Through a file without a disk: into a BytesIO Pillow encodes with the GIL held, and other threads would wait.
    """
    try:
        memory: Any = os.fdopen(os.memfd_create("jpeg"), "w+b")
    except (AttributeError, OSError):  # not every system has it, or lets it be used
        memory = io.BytesIO()
    with memory as out:
        as_image(picture).save(out, "JPEG", quality=quality, subsampling=0)
        out.seek(0)
        encoded: bytes = out.read()
    return encoded


def encoded_pictures(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of every picture in a tar shard, under a folder, or in the one file, in stored order.

    Raises InvalidInput for a shard that is no tar file, FileNotFoundError.
    """
    if source.suffix.lower() in SUFFIXES and source.is_file():
        yield source.name, source.read_bytes()
        return
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES):
            yield str(path.relative_to(source)), path.read_bytes()
        return
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
    except tarfile.TarError as error:
        raise InvalidInput(str(source), error, "a whole tar shard, a folder or a picture") from error


def centre_crops(sources: Sequence[Path], size: int, limit: int | None = None) -> npt.NDArray[np.uint8]:
    """uint8 [N,3,size,size]: the middle of every picture; smaller ones are enlarged first."""
    crops = []
    for source in sources:
        for name, data in encoded_pictures(source):
            crops.append(centre_crop(decode_picture(data, field=f"{source}: {name}"), size))
            if limit is not None and len(crops) == limit:
                return np.stack(crops)
    if not crops:
        raise InvalidInput("pictures", [str(s) for s in sources], "shards or folders that hold some")
    return np.stack(crops)


def sample_crops(sources: Sequence[Path] | None, size: int, limit: int) -> npt.NDArray[np.uint8]:
    """uint8 [N,3,size,size]: centre crops of pictures, or where none are named of photographs inside scikit-image.

    Raises as `centre_crops` does, and RuntimeError where scikit-image would be needed and is not there.
    """
    if sources:
        return centre_crops(sources, size, limit)
    try:
        from skimage import data
    except ImportError:
        raise RuntimeError("name pictures to compare on, or: pip install 'dat-service[demo]'") from None
    pictures = (np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1)) for name in PHOTOGRAPHS[:limit])
    return np.stack([centre_crop(picture, size) for picture in pictures])


def centre_crop(picture: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """uint8 [3,size,size]: the middle of a picture, which is enlarged first where it is smaller."""
    picture = enlarge(picture, size)
    top, left = (picture.shape[1] - size) // 2, (picture.shape[2] - size) // 2
    return picture[:, top : top + size, left : left + size]


def enlarge(picture: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """The picture itself, or scaled up so that its shorter side is `size`."""
    _, height, width = picture.shape
    if min(height, width) >= size:
        return picture
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return pixels(as_image(picture).resize(target, Image.Resampling.BICUBIC))
