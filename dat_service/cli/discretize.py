"""`dat discretize`: pictures in, pictures out, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def discretize(
    pictures: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for NAME.png, and NAME.npy with --indices.")],
    codec: Annotated[str, typer.Option(help="Codec (`dat codecs list`).")] = "tiny-f8",
    indices: Annotated[bool, typer.Option("--indices", help="Write the tokens too, uint16 [h,w].")] = False,
    engine: Annotated[str, typer.Option(help="auto, torch, cpu, onnx or reference.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, tf32, mixed, fp16 or bf16.")] = "auto",
    tricks: Annotated[str, typer.Option(help="auto, all, none, all,-graphs, ...")] = "auto",
) -> None:
    """Reconstruct pictures with a codec, in this process. A file that is no picture is named; the others go on."""
    import io

    import numpy as np

    from dat_service.settings import make_settings
    from dat_workers.codecs.spec import CodecError
    from dat_workers.discretizer import Discretizer
    from dat_workers.engines.config import EngineConfig
    from dat_workers.errors import EngineError, InvalidInput
    from dat_workers.images.encoded import decode_picture, encode_png
    from dat_workers.request import check_outputs
    from dat_workers.system.files import write_atomically

    stems = [p.stem for p in pictures]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if twice:
        typer.echo(f"dat discretize: several pictures would be written as {twice[:5]}", err=True)
        raise typer.Exit(1)
    targets = {(out / f"{stem}.png").resolve() for stem in stems}
    overwritten = [str(p) for p in pictures if p.resolve() in targets]
    if overwritten:
        typer.echo(f"dat discretize: --out {out} would overwrite {overwritten[:5]}", err=True)
        raise typer.Exit(1)
    failed = 0
    try:
        discretizer = Discretizer.from_store(codec, EngineConfig(engine, device, dtype, tricks))
        names = ("reconstruction", "indices") if indices else ("reconstruction",)
        check_outputs(names, discretizer.outputs)
        out.mkdir(parents=True, exist_ok=True)
        limit = make_settings().max_image_pixels
        for path in pictures:
            try:
                picture = decode_picture(path.read_bytes(), max_pixels=limit, field=str(path), upright=True)
                q = discretizer.discretize(picture[None], outputs=names)
            except (InvalidInput, EngineError, OSError) as error:
                typer.echo(f"skipped: {error}", err=True)
                failed += 1
                continue
            write_atomically(out / f"{path.stem}.png", encode_png(q["reconstruction"][0]))
            if indices:
                buffer = io.BytesIO()
                np.save(buffer, q["indices"][0])
                write_atomically(out / f"{path.stem}.npy", buffer.getvalue())
            typer.echo(str(out / f"{path.stem}.png"))
    except (CodecError, InvalidInput, ValueError, RuntimeError, OSError) as error:
        typer.echo(f"dat discretize: {error}", err=True)
        raise typer.Exit(1) from None
    if failed:
        raise typer.Exit(1)
