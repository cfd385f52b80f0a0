"""`dat precompute`: sends whole datasets through Q once, without a server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import command_errors
from dat_service.cli.output import MovingRate, duration, live_progress, time_left
from dat_workers.system.signals import handle_signals

if TYPE_CHECKING:
    from dat_workers.precompute import JobProgress, Summary


@command_errors("dat precompute", interrupted="interrupted; the same command continues where this run stopped")
def precompute(
    source: Annotated[
        list[str],
        Argument(
            metavar="SRC",
            help="Shards: .tar files, a pattern such as 'train-{000000..000146}.tar', a folder of them, or an "
            "s3://, gs:// or hf:// address. Or a folder of pictures, whose subfolders become the classes.",
        ),
    ],
    dst: Annotated[str, Argument(metavar="DST", help="Folder or address to write the new shards to.")],
    codec: options.Codec = "tiny-f8",
    outputs: Annotated[
        str, Option(help="Fields to store, with commas: reconstruction (Q(x)), indices (uint16 tokens), image (x).")
    ] = "reconstruction",
    picture: Annotated[str, Option("--format", help="Format of the pictures: jpg, png or webp.")] = "jpg",
    quality: Annotated[int, Option(help="Quality of jpg and webp pictures, 1 to 100.")] = 95,
    resize: Annotated[int | None, Option(help="Scale the shorter side to this many pixels first.")] = None,
    crop: Annotated[int | None, Option(help="Cut out the centre square with this side in pixels.")] = None,
    augment: Annotated[int, Option(help="Cut out this many random crops instead, scaled to --crop.")] = 0,
    replace_fraction: Annotated[float, Option(help="Replace this share of the tokens by random ones.")] = 0.0,
    variants: Annotated[int, Option(help="Versions of each view; each has other tokens replaced.")] = 1,
    seed: Annotated[int, Option(help="Seed of the random crops and tokens.")] = 0,
    keep: Annotated[
        str | None, Option(help="Fields to copy, such as cls,json. [default: all but the picture]")
    ] = None,
    workers: Annotated[int, Option(help="Workers, each with a copy of the codec; use one for each GPU.")] = 1,
    ray: Annotated[
        bool, Option("--ray", help="Run the workers on Ray: on the cluster at RAY_ADDRESS, else on a new one.")
    ] = False,
    gpus: Annotated[
        float | None, Option(help="GPUs of each worker on Ray; with 0.5, two share one. [default: 1 if present]")
    ] = None,
    on_error: Annotated[
        str, Option(help="fail: end at the first unusable sample; skip: leave it out and list it.")
    ] = "fail",
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace what DST holds of another codec or of other settings.")
    ] = False,
    check_hashes: Annotated[
        bool, Option("--check-hashes", help="Compare SHA-256 of sources and shards; replace altered shards.")
    ] = False,
    pictures_a_shard: Annotated[int, Option(help="Pictures in a shard, from a folder of pictures.")] = 1000,
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tricks: options.Tricks = "auto",
    threads: Annotated[int, options.setting("threads")] = 0,
) -> None:
    """Discretize a dataset once, shard by shard.

    Every shard of SRC becomes a shard of the same name in DST. The job may be killed at any moment: the same
    command then writes the missing shards, and the result has the same bytes. DST/manifest describes each shard;
    DST/contact-sheet.html shows 64 samples beside their Q(x).
    """
    # Set before torch is loaded: its threads would spin while they wait, and take the cores from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if on_error not in ("fail", "skip"):
        raise ValueError(f"--on-error is {on_error!r}, must be fail or skip")

    from dat_workers.engines.config import EngineConfig
    from dat_workers.precompute import SampleFailed
    from dat_workers.precompute import precompute as run

    typer.echo(f"loading {codec} ...", err=True)
    try:
        # SIGTERM ends the job like Ctrl-C, so that no half-written shard is left.
        with handle_signals(signal.default_int_handler, signal.SIGTERM), live_progress(plain_every_s=60) as show:
            summary = run(
                source, dst, codec=codec, outputs=outputs.split(","), picture=picture, quality=quality,
                resize=resize, crop=crop, augment=augment, replace_fraction=replace_fraction, variants=variants,
                seed=seed, keep=None if keep is None else [f for f in keep.split(",") if f], workers=workers,
                ray=ray, gpus=gpus, skip=on_error == "skip", overwrite=overwrite, check_hashes=check_hashes,
                pictures_a_shard=pictures_a_shard,
                engine_config=EngineConfig(engine, device, dtype, tricks, threads), report=_reporter(show),
            )  # fmt: skip
    except SampleFailed as error:
        error.add_note("--on-error skip leaves such samples out")
        raise
    _print_summary(summary, dst)


def _reporter(show: Callable[[float | None, str], None]) -> Callable[[JobProgress], None]:
    """Returns a function that shows a job's state: share done, rate, time left, shards and losses."""
    rate = MovingRate()  # starts again with the clock of the state, once the shards in DST have been looked at

    def report(state: JobProgress) -> None:
        share_per_s, images_per_s = rate.per_second(state.seconds, state.share, state.images)
        text = (
            f"{state.share:.1%}, {images_per_s:.1f} images/s, {time_left(1 - state.share, share_per_s)}, "
            f"{state.shards_done} of {state.shards} shards"
        )
        if state.skipped:
            text += f", {state.skipped} skipped"
        if state.workers_lost:
            text += f", {state.workers_lost} workers lost"
        show(state.share, text)

    return report


def _print_summary(summary: Summary, dst: str) -> None:
    """Prints what DST holds now, what this run added, and the first skipped samples."""
    written = summary.shards - summary.shards_kept
    rate = f", {summary.images / summary.seconds:.1f} images/s" if summary.images and summary.seconds else ""
    typer.echo(
        f"{dst}: {summary.samples} samples in {summary.shards} shards, {summary.nbytes / 1e6:.1f} MB, "
        f"codec {summary.fingerprint[:12]}\n"
        f"this run: {written} shards, {summary.images} images in {duration(summary.seconds)}{rate}; "
        f"{summary.shards_kept} shards were there"
    )
    if summary.workers_lost:
        typer.echo(f"{summary.workers_lost} times a worker ended, and its shard was computed again")
    if summary.others:
        typer.echo(f"{summary.others} more shards in {dst}/manifest do not belong to this source")
    if summary.skipped:
        typer.echo(f"{summary.skipped} samples skipped:")
        for shard, key, reason in summary.skipped_first:
            typer.echo(f"  {shard}, {key or 'after the last sample'}: {reason}")
        if summary.skipped > len(summary.skipped_first):
            typer.echo(f"  ... the manifest, {dst}/manifest, names all of them")
    typer.echo(f"look at {dst}/contact-sheet.html before you train on it")
