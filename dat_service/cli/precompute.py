"""`dat precompute` sends a whole dataset through Q once, without a server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import command_errors
from dat_service.cli.output import MovingRate, live_progress, print_left_out, printable, time_left
from dat_workers.system.ray_cluster import check_cluster
from dat_workers.system.signals import handle_signals
from dat_workers.system.text import duration

FIRST_REASONS = 20  # of shards that were made again

if TYPE_CHECKING:
    from dat_workers.precompute import JobProgress, Summary


@command_errors("dat precompute", interrupted="interrupted; the same command continues where this run stopped")
def precompute(
    source: Annotated[
        list[str],
        Argument(
            metavar="SRC",
            help="Shards to read: .tar files, a pattern such as 'train-{000000..000146}.tar', a folder of .tar "
            "files, or an s3://, gs:// or hf:// address. Instead of shards, a folder of pictures may be given; "
            "its subfolders become the classes.",
        ),
    ],
    dst: Annotated[str, Argument(metavar="DST", help="Folder or address to which the new shards are written.")],
    codec: options.Codec = "tiny-f8",
    outputs: Annotated[
        str, Option(help="Fields to store, with commas: reconstruction (Q(x)), indices (uint16 tokens), image (x).")
    ] = "reconstruction",
    picture: Annotated[str, Option("--format", help="Format of the stored pictures: jpg, png or webp.")] = "jpg",
    quality: Annotated[int, Option(help="Quality of stored jpg and webp pictures, 1 to 100.")] = 95,
    resize: Annotated[int | None, Option(help="First scale the shorter side to this many pixels.")] = None,
    crop: Annotated[int | None, Option(help="Cut out the centre square whose side has this many pixels.")] = None,
    augment: Annotated[int, Option(help="Cut out this many random crops instead, scaled to --crop.")] = 0,
    replace_fraction: Annotated[float, Option(help="Share of tokens to replace by random ones.")] = 0.0,
    variants: Annotated[int, Option(help="Versions of each crop, with different tokens replaced.")] = 1,
    seed: Annotated[int, Option(help="Seed of the random crops and the random tokens.")] = 0,
    keep: Annotated[
        str | None, Option(help="Fields of SRC to copy, such as cls,json.  [default: all except the picture]")
    ] = None,
    workers: Annotated[int, Option(help="Workers, each with its own codec; use one for each GPU.")] = 1,
    ray: Annotated[
        bool, Option("--ray", help="Run the workers on the Ray cluster at RAY_ADDRESS; if unset, on a new Ray.")
    ] = False,
    gpus: Annotated[
        float | None, Option(help="GPUs for each worker on Ray; with 0.5, two share one.  [default: 1 if present]")
    ] = None,
    on_error: options.OnError = "fail",
    upright: options.Upright = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace shards that were written with a different codec or settings.")
    ] = False,
    check_hashes: Annotated[
        bool, Option("--check-hashes", help="Check the SHA-256 of sources and shards; replace altered shards.")
    ] = False,
    pictures_a_shard: Annotated[int, Option(help="Pictures in a shard, for a folder of pictures.")] = 1000,
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tricks: options.Tricks = "auto",
    threads: Annotated[int, options.setting("threads")] = 0,
) -> None:
    """Discretize a dataset once, shard by shard.

    Every shard of SRC becomes a shard of the same name in DST. If the job is killed, run the same command again: it
    writes the missing shards, and the result has the same bytes as without the interruption. DST/manifest describes
    each shard. DST/contact-sheet.html shows 64 samples beside their Q(x).
    """
    # This must be set before torch is loaded: otherwise torch's threads spin while they wait, and so take the cores
    # from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    skip = options.skips(on_error)

    if ray and (cluster := os.environ.get("RAY_ADDRESS")):
        check_cluster(cluster)  # before the codec is loaded and the source is listed, which may take minutes

    from dat_workers.engines.config import EngineConfig
    from dat_workers.precompute import SampleFailed
    from dat_workers.precompute import precompute as run

    try:
        # SIGTERM must end the job as Ctrl-C does, so that no half-written shard is left.
        with handle_signals(signal.default_int_handler, signal.SIGTERM), live_progress(plain_every_s=60) as show:
            summary = run(
                source, dst, codec=codec, outputs=outputs.split(","), picture=picture, quality=quality,
                resize=resize, crop=crop, augment=augment, replace_fraction=replace_fraction, variants=variants,
                seed=seed, keep=None if keep is None else keep.split(","), workers=workers,
                ray=ray, gpus=gpus, skip=skip, upright=upright, overwrite=overwrite, check_hashes=check_hashes,
                pictures_a_shard=pictures_a_shard,
                engine_config=EngineConfig(engine, device, dtype, tricks, threads), report=_reporter(show, codec),
            )  # fmt: skip
    except SampleFailed as error:
        error.add_note("--on-error skip leaves such samples out")
        raise
    _print_summary(summary, dst)


def _finished(state: JobProgress) -> str:
    """Returns how much is written or skipped, and in which unit."""
    if state.samples is not None:
        return f"{state.samples_done} of {state.samples} samples ({state.share:.1%})"
    of_unit = "the bytes of SRC" if state.unit == "bytes" else "the shards"
    return f"{state.share:.1%} of {of_unit}, {state.samples_done} samples"


def _reporter(show: Callable[[float | None, str], None], codec: str) -> Callable[[JobProgress], None]:
    """Returns a function that shows a job's phase, progress, speed, time left, skipped samples and lost workers."""
    from dat_workers.precompute.progress import COMPUTING, CONTACT_SHEET, LOOKING

    rate = MovingRate()  # it starts again when the job has checked the shards in DST and its clock goes back to 0

    def report(state: JobProgress) -> None:
        if state.share is None:
            show(None, f"loading {codec} ...")
            return
        share_per_s, images_per_s = rate.per_second(state.seconds, state.share, state.images)
        left = time_left(1 - state.share, share_per_s)
        if state.phase == LOOKING:
            show(state.share, f"{state.phase}: {state.shards_looked} of {state.shards}, {left}")
            return
        text = f"{_finished(state)}, {state.shards_done} of {state.shards} shards"
        if state.phase == COMPUTING and state.share < 1:
            text += f", {images_per_s:.1f} images/s, {left}"
        if state.phase == CONTACT_SHEET:
            text += f"; {state.phase} ..."
        if state.skipped:
            text += f", {state.skipped} skipped"
        if state.workers_lost:
            text += f", {state.workers_lost} workers lost"
        show(state.share, text)

    return report


def _print_summary(summary: Summary, dst: str) -> None:
    """Prints what DST contains now, what this run has added, and the first few skipped samples."""
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
    if summary.removed:
        names = ", ".join(summary.removed[:FIRST_REASONS]) + (
            ", ..." if len(summary.removed) > FIRST_REASONS else ""
        )
        typer.echo(f"{len(summary.removed)} shards removed, since SRC fills fewer shards now: {names}")
    for name, number in summary.lacking:
        typer.echo(f"{number} of {summary.samples} samples have no field {name}, which --keep names")
    if summary.remade:
        typer.echo(f"{len(summary.remade)} shards were there and were made again:")
        for shard, reason in summary.remade[:FIRST_REASONS]:
            typer.echo(printable(f"  {shard}: {reason}"))
        if len(summary.remade) > FIRST_REASONS:
            typer.echo(f"  ... and {len(summary.remade) - FIRST_REASONS} more")
    if summary.skipped:
        typer.echo(f"{summary.skipped} samples skipped:")
        for shard, key, reason in summary.skipped_first:
            typer.echo(printable(f"  {shard}, {key or 'after the last sample'}: {reason}"))
        if summary.skipped > len(summary.skipped_first):
            typer.echo(f"  ... the manifest, {dst}/manifest, names all of them")
    print_left_out(summary.left_out)
    typer.echo(f"look at {dst}/contact-sheet.html before you train on it")
