"""`dat bench`: how fast the codec and the service are on the user's own machines."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dat_service.bench.codec import Row

app = typer.Typer(help="Benchmarks: codec, client.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("codec")
def codec(
    name: Annotated[str, typer.Option("--codec", help="An embedded or installed codec.")] = "tiny-f8",
    engine: Annotated[list[str] | None, typer.Option(help="Measure only this engine; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Measure only this dtype; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in a batch. [default: 64 on CUDA, 16 on a CPU]")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels.")] = 224,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures, folders or .tar shards. [default: photographs inside scikit-image]"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every engine is measured.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: all cores]")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
) -> None:
    """Measure the images/s of each engine here, beside the reference, and whether their tokens are equal."""
    import torch

    from dat_service.bench.codec import choose_engines, default_batch, measure
    from dat_service.cli.codecs import told
    from dat_workers.codecs.spec import CodecError
    from dat_workers.engines.factory import pick_device
    from dat_workers.system.files import write_atomically

    with told():
        try:
            pairs = choose_engines(pick_device(device), engine or (), dtype or ())
            if not pairs:
                raise ValueError(f"no engine is named {engine} with dtype {dtype} here")
            if threads:
                torch.set_num_threads(threads)
            batch = batch or default_batch(device)
            rows = measure(
                name, pairs, batch=batch, size=size, device=device, pictures=images, rounds=rounds, report=_report
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise error if isinstance(error, CodecError) else CodecError(str(error)) from error
        typer.echo(f"{name}, batches of {batch}, {size} x {size}, on {pick_device(device)}")
        _print(rows)
        if out is not None:
            facts = {"codec": name, "batch": batch, "size": size, "rows": [asdict(row) for row in rows]}
            write_atomically(out, (json.dumps(facts, indent=1) + "\n").encode())
        if not any(row.images_per_s for row in rows):
            raise typer.Exit(1)


def _report(line: str) -> None:
    typer.echo(line, err=True)


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("engine", "images/s", "lowest", "highest", "x reference", "equal tokens", box=None)
    for row in rows:
        if row.error:
            table.add_row(row.engine, f"not measured: {row.error}")
            continue
        speeds = (statistics.median(row.images_per_s), min(row.images_per_s), max(row.images_per_s))
        times = "–" if row.times_reference is None else f"{row.times_reference:.2f}"
        agreement = "–" if row.token_agreement is None else f"{row.token_agreement:.3%}"
        table.add_row(row.engine, *(f"{speed:.4g}" for speed in speeds), times, agreement)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


@app.command("client")
def client(
    url: Annotated[str, typer.Option(help="http://host:port of the service.")] = "http://127.0.0.1:8000",
    codec: Annotated[str, typer.Option(help="The codec to ask.")] = "tiny-f8",
    batch: Annotated[int, typer.Option(min=1, help="Images in a call.")] = 128,
    size: Annotated[int, typer.Option(min=1, help="Side of an image in pixels.")] = 224,
    calls: Annotated[int, typer.Option(min=1, help="Calls that are measured.")] = 20,
    in_flight: Annotated[int, typer.Option(min=1, help="Calls under way at the same time.")] = 1,
    parts: Annotated[int, typer.Option(min=1, help="Requests that a call is split into (max_in_flight).")] = 1,
    gradients: Annotated[
        Literal["none", "FP16", "FP32", "INT8"], typer.Option(help="Dtype of the gradients that are sent along.")
    ] = "none",
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the service, and for a call.")] = 300.0,
    api_key: Annotated[str | None, typer.Option(help="The API key, if the service wants one.")] = None,
) -> None:
    """Show where the time of a call goes: client, network, queue, codec, the rest of the server."""
    from dat_client import DatError
    from dat_service.bench.client import measure

    try:
        table = measure(
            url, codec, batch=batch, size=size, calls=calls, in_flight=in_flight, parts=parts, gradients=gradients,
            timeout_s=timeout_s, api_key=api_key,
        )  # fmt: skip
    except (DatError, ValueError) as error:
        typer.echo(f"dat bench client: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(table)
