"""`dat discretize` computes Q(x) of picture files, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import FAILED, command_errors


@command_errors("dat discretize")
def discretize(
    pictures: Annotated[list[Path], Argument(help="JPEG, PNG or WebP files to reconstruct.")],
    out: Annotated[
        Path, Option("--out", "-o", help="Folder for NAME.png of each picture, and for NAME.npy with --indices.")
    ],
    codec: options.Codec = "tiny-f8",
    indices: Annotated[
        bool, Option("--indices", help="Also write the tokens to NAME.npy, as a uint16 array [h,w].")
    ] = False,
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tricks: options.Tricks = "auto",
) -> None:
    """Reconstruct pictures with a codec, in this process.

    Files that cannot be reconstructed are skipped and reported on stderr, and the exit status is then 1.
    """
    import io

    import numpy as np

    from dat_service.settings import make_settings
    from dat_workers.discretizer import Discretizer
    from dat_workers.engines.config import EngineConfig
    from dat_workers.errors import EngineError, InvalidInput
    from dat_workers.images.encoded import decode_picture, encode_png
    from dat_workers.request import check_outputs
    from dat_workers.system.files import write_atomically

    stems = [path.stem for path in pictures]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise ValueError(f"several pictures would be written to the same file: {repeated[:5]}")
    targets = {(out / f"{stem}.png").resolve() for stem in stems}
    overwritten = [str(path) for path in pictures if path.resolve() in targets]
    if overwritten:
        raise ValueError(f"--out {out} would overwrite the input files {overwritten[:5]}")
    discretizer = Discretizer.from_store(codec, EngineConfig(engine, device, dtype, tricks))
    names = ("reconstruction", "indices") if indices else ("reconstruction",)
    check_outputs(names, discretizer.outputs)
    out.mkdir(parents=True, exist_ok=True)
    limit = make_settings().max_image_pixels
    skipped = 0
    for path in pictures:
        try:
            picture = decode_picture(path.read_bytes(), max_pixels=limit, field=str(path), upright=True)
            q = discretizer.discretize(picture[None], outputs=names)
        except (InvalidInput, EngineError, OSError) as error:
            typer.echo(f"skipped: {error}", err=True)
            skipped += 1
            continue
        write_atomically(out / f"{path.stem}.png", encode_png(q["reconstruction"][0]))
        if indices:
            buffer = io.BytesIO()
            np.save(buffer, q["indices"][0])
            write_atomically(out / f"{path.stem}.npy", buffer.getvalue())
        typer.echo(str(out / f"{path.stem}.png"))
    if skipped:
        raise typer.Exit(FAILED)
