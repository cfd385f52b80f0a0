"""`dat codecs` lists, shows, downloads and imports codecs; `dat export` writes a codec as ONNX files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import command_errors
from dat_service.cli.output import MovingRate, live_progress, print_table, time_left

if TYPE_CHECKING:
    from dat_workers.codecs.store import CodecStore

app = typer.Typer(help="List, show, download, import and verify codecs.", no_args_is_help=True)


@app.command("list")
@command_errors("dat codecs list")
def list_codecs() -> None:
    """List the published codecs and those installed on this machine.

    One token stands for f x f pixels. The codebook has K entries, which are vectors of d numbers.
    """
    from rich.table import Table

    from dat_workers.codecs import file
    from dat_workers.codecs.registry import REGISTRY
    from dat_workers.codecs.spec import CodecError
    from dat_workers.codecs.store import CodecStore

    store = CodecStore()
    table = Table("name", "f", "K", "d", "parameters", "status", box=None)
    for name in store.names():
        status = store.status(name)
        try:
            spec = REGISTRY[name] if name in REGISTRY else file.read_header(store.path(name)).spec
        except CodecError:
            table.add_row(name, "", "", "", "", status)
            continue
        size, k, d = "–", "–", "–"
        if spec.has_tokens:
            size, k, d = f"{file.parameter_count(spec) / 1e6:.1f} M", str(spec.codebook_size), str(spec.latent_dim)
        table.add_row(name, str(spec.factor), k, d, size, status)
    print_table(table)


@app.command()
@command_errors("dat codecs show")
def show(
    name: Annotated[str, Argument(metavar="NAME", help="Name of the codec; `dat codecs list` shows all names.")],
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show the geometry, source, licence and status of a codec. An installed codec is read and verified."""
    from dat_workers.codecs import file
    from dat_workers.codecs.registry import REGISTRY
    from dat_workers.codecs.store import CodecStore

    store = CodecStore()
    status = store.status(name)
    codec = store.load(name) if name not in REGISTRY or status in ("embedded", "installed") else None
    spec = codec.spec if codec else REGISTRY[name]
    facts: dict[str, Any] = {
        **spec.to_dict(),
        "factor": spec.factor,
        "parameters": file.parameter_count(spec),
        "status": status,
        "path": None if name == "identity" else str(store.path(name)),
        "fingerprint": codec.fingerprint if codec else None,
        "origin": asdict(codec.origin) if codec else None,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        typer.echo(f"{key:17}{'–' if value in (None, '') else value}")


@app.command()
@command_errors("dat codecs pull", interrupted="interrupted; the same command resumes the download")
def pull(
    name: Annotated[
        str, Argument(metavar="NAME", help="Name of a published codec; `dat codecs list` shows all names.")
    ],
    url: Annotated[
        str | None, Option(help="Address to download from.  [default: the address where it was published]")
    ] = None,
) -> None:
    """Download a published codec, check it and install it. An interrupted download is resumed."""
    from dat_workers.codecs import download
    from dat_workers.codecs.store import CodecStore

    store = CodecStore()
    with live_progress(plain_every_s=5) as show_progress:
        fingerprint = download.pull(name, store, _reporter(name, show_progress), url)
    _print_installed(store, name, fingerprint)


@app.command("import")
@command_errors("dat codecs import")
def import_checkpoint(
    checkpoint: Annotated[
        Path, Argument(metavar="CKPT", help="Checkpoint file: .ckpt, .zip, .pt or .safetensors.")
    ],
    name: Annotated[str, Option("--as", metavar="NAME", help="Name under which the codec is installed.")],
    force: Annotated[bool, Option("--force", help="Replace a codec that has this name already.")] = False,
) -> None:
    """Install a codec from a checkpoint file.

    If NAME is the name of a published codec, the weights must have the geometry of that codec. Otherwise, the
    geometry is read from the weights.
    """
    from dat_workers.codecs.checkpoint import infer_spec, read_checkpoint
    from dat_workers.codecs.file import Origin, check_weights
    from dat_workers.codecs.registry import REGISTRY
    from dat_workers.codecs.store import CodecStore

    store = CodecStore()
    store.path(name)  # refuses an unsafe name before a gigabyte is read
    known = REGISTRY.get(name)
    loaded = read_checkpoint(checkpoint, known)
    spec = known or infer_spec(loaded.tensors, name)
    check_weights(spec, loaded.tensors, str(checkpoint))
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    fingerprint = store.add(spec, loaded.tensors, Origin.now(checkpoint.name, digest), replace=force)
    typer.echo(f"dropped: {', '.join(loaded.dropped) or 'nothing'}")
    if loaded.converted:
        typer.echo(f"converted: {loaded.conversion}")
    _print_installed(store, name, fingerprint)


@command_errors("dat export")
def export(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Folder to write the files to.")],
    codec: options.Codec = "tiny-f8",
    force: Annotated[
        bool, Option("--force", help="Write even if the folder already holds a different codec or unrelated files.")
    ] = False,
) -> None:
    """Write a codec as ONNX files.

    The folder gets encoder.onnx, codebook.onnx, decoder.onnx and codec.json. The files are then checked by running
    them with ONNX Runtime.
    """
    from dat_workers.codecs.store import CodecStore, load_model
    from dat_workers.engines.onnx.export import write_export

    file = CodecStore().load(codec)
    manifest = write_export(load_model(file), codec, file.fingerprint, folder, force)
    for name, digest in manifest.files.items():
        megabytes = (folder / name).stat().st_size / 1e6
        typer.echo(f"{folder / name}  {megabytes:.1f} MB, sha256 {digest[:12]}")
    typer.echo(f"{folder / 'codec.json'}  {codec}, fingerprint {manifest.fingerprint[:12]}, opset {manifest.opset}")


def _reporter(name: str, show: Callable[[float | None, str], None]) -> Callable[[int, int | None], None]:
    """Returns a function that shows a download's progress, given the bytes so far and the total if it is known."""
    rate = MovingRate()

    def report(done: int, size: int | None) -> None:
        (per_second,) = rate.per_second(time.monotonic(), done)
        speed = f"{per_second / 1e6:.1f} MB/s"
        if size is None:
            show(None, f"{name}: {done / 1e6:.1f} MB, {speed}")
        else:
            left = time_left(size - done, per_second)
            show(done / max(size, 1), f"{name}: {done / 1e6:.1f} of {size / 1e6:.1f} MB, {speed}, {left}")

    return report


def _print_installed(store: CodecStore, name: str, fingerprint: str) -> None:
    typer.echo(f"installed {name}\nfingerprint {fingerprint}\npath {store.path(name)}")
