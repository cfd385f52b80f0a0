"""`dat bench`: measures the codec and the service on the user's own machines."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Option

from dat_service.cli import options
from dat_service.cli.errors import FAILED, command_errors
from dat_service.cli.output import check_output_file, log, print_table, write_json

if TYPE_CHECKING:
    from dat_service.bench.codec import Row

app = typer.Typer(help="Measure the speed of the codec, or of a client's calls to a service.", no_args_is_help=True)


@app.command("codec")
@command_errors("dat bench codec")
def codec(
    name: Annotated[str, Option("--codec", help="Name of an embedded or installed codec.")] = "tiny-f8",
    engine: Annotated[list[str] | None, Option(help="Measure only this engine; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, Option(help="Measure only this dtype; may be repeated.")] = None,
    device: options.Device = "auto",
    batch: Annotated[
        int | None, Option(min=1, help="Number of images in a batch.  [default: 64 on CUDA, 16 on a CPU]")
    ] = None,
    size: Annotated[int, Option(min=8, help="Height and width of the images in pixels.")] = 224,
    images: Annotated[
        list[str] | None,
        Option(help="Pictures, folders or .tar shards to measure on.  [default: photographs of scikit-image]"),
    ] = None,
    rounds: Annotated[int, Option(min=1, help="Number of times that each engine is measured.")] = 5,
    threads: Annotated[int | None, Option(min=1, help="CPU threads.  [default: one for each core]")] = None,
    out: Annotated[Path | None, Option(help="Also write the result to this JSON file.")] = None,
) -> None:
    """Measure the images per second of each engine, and the share of its tokens that equal the reference's."""
    import torch

    from dat_service.bench.codec import choose_engines, default_batch, measure
    from dat_workers.engines.factory import pick_device

    check_output_file("--out", out)
    pairs = choose_engines(pick_device(device), engine or (), dtype or ())
    if threads:
        torch.set_num_threads(threads)
    batch = batch or default_batch(device)
    rows = measure(name, pairs, batch=batch, size=size, device=device, pictures=images, rounds=rounds, report=log)
    typer.echo(f"{name}, batches of {batch}, {size} x {size}, on {pick_device(device)}")
    _print(rows)
    if out is not None:
        facts = {"codec": name, "batch": batch, "size": size, "rows": [asdict(row) for row in rows]}
        write_json(out, facts)
    if not any(row.images_per_s for row in rows):
        raise typer.Exit(FAILED)


def _print(rows: list[Row]) -> None:
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
    print_table(table)


@app.command("client")
@command_errors("dat bench client")
def client(
    url: Annotated[str, Option(help="Address of the service.")] = "http://127.0.0.1:8000",
    codec: Annotated[str, Option(help="Name of a codec that the service serves.")] = "tiny-f8",
    batch: Annotated[int, Option(min=1, help="Number of images in a call.")] = 128,
    size: Annotated[int, Option(min=1, help="Height and width of the images in pixels.")] = 224,
    calls: Annotated[int, Option(min=1, help="Number of measured calls.")] = 20,
    in_flight: Annotated[int, Option(min=1, help="Number of calls that are in flight at the same time.")] = 1,
    parts: Annotated[int, Option(min=1, help="Number of requests that a call is split into (max_in_flight).")] = 1,
    gradients: Annotated[
        Literal["none", "FP16", "FP32", "INT8"],
        Option(help="Dtype of the gradients that are sent with the images."),
    ] = "none",
    timeout_s: Annotated[float, Option(help="Longest wait for the service, and for each call.")] = 300.0,
    api_key: Annotated[str | None, Option(help="API key, if the service requires one.")] = None,
) -> None:
    """Measure how a call's time is divided among client, network, queue, codec and the rest of the server."""
    from dat_service.bench.client import measure

    table = measure(
        url, codec, batch=batch, size=size, calls=calls, in_flight=in_flight, parts=parts, gradients=gradients,
        timeout_s=timeout_s, api_key=api_key,
    )  # fmt: skip
    typer.echo(table)
