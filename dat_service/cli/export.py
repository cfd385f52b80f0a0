"""`dat export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[Path, typer.Argument(help="Folder for the files.", show_default=False)],
    codec: Annotated[str, typer.Option(help="Codec (`dat codecs list`).")] = "tiny-f8",
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that holds another codec, or other files.")
    ] = False,
) -> None:
    """Write a codec as ONNX: encoder.onnx, codebook.onnx, decoder.onnx and codec.json, checked by running them."""
    from dat_workers.codecs.spec import CodecError
    from dat_workers.codecs.store import CodecStore, load_model
    from dat_workers.engines.onnx.export import write_export

    try:
        file = CodecStore().load(codec)
        manifest = write_export(load_model(file), codec, file.fingerprint, folder, force)
        sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except (CodecError, RuntimeError, OSError) as error:
        typer.echo(f"dat export: {error}", err=True)
        raise typer.Exit(1) from None
    for name, digest in manifest.files.items():
        typer.echo(f"{folder / name}  {sizes[name] / 1e6:.1f} MB, sha256 {digest[:12]}")
    typer.echo(f"{folder / 'codec.json'}  {codec}, fingerprint {manifest.fingerprint[:12]}, opset {manifest.opset}")
