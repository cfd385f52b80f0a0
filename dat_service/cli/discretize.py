"""`dat discretize` computes Q(x) of picture files, without a server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import FAILED, command_errors
from dat_service.cli.output import log, print_left_out, printable

if TYPE_CHECKING:
    from dat_client.dataset_format.tar_samples import Sample
    from dat_client.wire.tensors import Array
    from dat_workers.sources.find import Source


@command_errors("dat discretize")
def discretize(
    pictures: Annotated[
        list[str], Argument(
            metavar="PICTURES", help="Picture files, or folders whose pictures, at any depth, are reconstructed."
        ),
    ],
    out: Annotated[
        Path,
        Option(
            "--out", "-o",
            help="Folder for NAME.png of each picture, and for NAME.npy with --indices. The pictures of a "
            "folder keep their sub-folders.",
        ),
    ],
    codec: options.Codec = "tiny-f8",
    indices: Annotated[
        bool, Option("--indices", help="Also write the tokens to NAME.npy, as a uint16 array [h,w].")
    ] = False,
    resize: Annotated[
        int | None, Option(min=1, max=8192, help="First scale the shorter side to this many pixels.")
    ] = None,
    on_error: options.OnError = "fail",
    upright: options.Upright = False,
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tricks: options.Tricks = "auto",
) -> None:  # fmt: skip
    """Reconstruct pictures with a codec, in this process.

    Files that cannot be reconstructed are named on stderr, and the others are written. The exit status is then 1,
    or 0 with --on-error skip.
    """
    from dat_service.settings import make_settings
    from dat_workers.discretizer import Discretizer
    from dat_workers.engines.config import EngineConfig
    from dat_workers.errors import EngineError
    from dat_workers.request import check_outputs
    from dat_workers.sources.find import find
    from dat_workers.sources.reader import ShardReader

    skip = options.skips(on_error)
    source = find(pictures, labelled=False, only_pictures=True, skip=True)
    targets = _targets(source, out)
    discretizer = Discretizer.from_store(codec, EngineConfig(engine, device, dtype, tricks))
    names = ("reconstruction", "indices") if indices else ("reconstruction",)
    check_outputs(names, discretizer.outputs)
    out.mkdir(parents=True, exist_ok=True)
    limit = make_settings().max_image_pixels
    written = failed = 0
    for shard in source.shards:
        paths = [_path(shard.address, name) for name in (*dict(shard.problems), *shard.files)]
        for path, sample in zip(paths, ShardReader(shard), strict=True):
            try:
                x, orientation = _decoded(sample, path, resize, upright, limit)
                q = discretizer.discretize(x[None], outputs=names)
            except (ValueError, EngineError) as error:  # InvalidInput is a ValueError
                log(f"skipped: {error}")
                failed += 1
                continue
            _write(out / targets[path], {name: array[0] for name, array in q.items()}, orientation)
            typer.echo(printable(str(out / targets[path])))
            written += 1
    print_left_out(source.left_out)
    if failed and (not skip or not written):
        raise typer.Exit(FAILED)


def _path(address: str, name: str) -> str:
    """Returns the path or address of a file below a folder, as a user writes it."""
    return f"{address.removeprefix('file://').rstrip('/')}/{name}"


def _targets(source: Source, out: Path) -> dict[str, PurePosixPath]:
    """Returns the path below `out` of each picture's Q(x). Raises InvalidInput if a file would be overwritten."""
    from dat_workers.errors import InvalidInput

    for folder in source.folders:
        if out.resolve().is_relative_to(Path(_path(folder, "")).resolve()):
            raise InvalidInput("--out", out, f"a folder outside of the pictures in {_path(folder, '')}")
    pairs = [
        (_path(shard.address, name), PurePosixPath(name).with_suffix(".png"))
        for shard in source.shards
        for name in shard.files
    ]
    targets = dict(pairs)
    if len(targets) < len(pairs):
        twice = Counter(path for path, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice} is named twice, perhaps by a folder and by itself; name each picture once")
    numbers = Counter(targets.values())
    repeated = [(path, target) for path, target in targets.items() if numbers[target] > 1]
    if repeated:
        inputs = ", ".join(path for path, target in repeated if target == repeated[0][1])
        raise ValueError(
            f"several pictures would be written to the same file {out / repeated[0][1]}: {inputs}; rename some, or "
            "give each folder an --out of its own"
        )
    results = {(out / target).resolve() for target in targets.values()}
    overwritten = [path for path in targets if Path(path).resolve() in results]
    if overwritten:
        raise ValueError(f"--out {out} would overwrite the input files {overwritten[:5]}")
    return targets


def _decoded(sample: Sample, path: str, resize: int | None, upright: bool, limit: int) -> tuple[Array, int]:
    """Returns the picture uint8 [3,H,W] and the EXIF orientation with which it must be shown.

    Raises InvalidInput if it is not usable or has more pixels than `limit` after it was scaled.
    """
    from dat_client.dataset_format.pictures import orientation
    from dat_client.dataset_format.views import prepared
    from dat_workers.errors import InvalidInput, TooLarge
    from dat_workers.images.encoded import DATA_FORMATS, MAX_PIXELS, open_picture, pixels

    if sample.problem:
        raise InvalidInput(path, sample.problem, "", f"{path}: {sample.problem}")
    (data,) = sample.fields.values()
    try:
        most = MAX_PIXELS if resize else limit
        picture = open_picture(data, field=path, max_pixels=most, upright=upright, formats=DATA_FORMATS)
    except TooLarge as error:
        if resize:
            raise
        raise TooLarge(path, error.value, f"{error.limit}, or --resize 512 to scale it down first") from error
    picture_orientation = orientation(picture)
    picture = prepared(picture, {"resize": resize, "crop": None})
    width, height = picture.size
    if width * height > limit:
        size = f"{width}x{height} = {width * height} pixels after --resize {resize}"
        raise TooLarge(path, size, f"at most {limit} pixels: give a smaller --resize")
    return pixels(picture), picture_orientation


def _write(path: Path, q: dict[str, Array], orientation: int) -> None:
    """Writes Q(x) to `path`, a .png file that viewers turn as they turn x, and its tokens to the .npy beside it."""
    import io

    import numpy as np

    from dat_workers.images.encoded import encode_png
    from dat_workers.system.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode_png(q["reconstruction"], orientation))
    if "indices" in q:
        buffer = io.BytesIO()
        np.save(buffer, q["indices"])
        write_atomically(path.with_suffix(".npy"), buffer.getvalue())
