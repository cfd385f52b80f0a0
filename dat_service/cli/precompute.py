"""`dat precompute`: datasets through Q once, shards in, shards out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dat_workers.precompute import JobProgress, Summary

LINE_EVERY_S = 60.0
RATE_OVER_S = 30.0


def precompute(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Shards: 'train-{000000..000146}.tar', a folder of them, or s3://, gs://, hf://; or a folder of "
            "pictures, whose folders become classes.",
            show_default=False,
        ),
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder or address to write to.", show_default=False)],
    codec: Annotated[str, typer.Option(help="Codec (`dat codecs list`).")] = "tiny-f8",
    outputs: Annotated[
        str, typer.Option(help="Of reconstruction (Q(x)), indices (its tokens, uint16) and image (x itself).")
    ] = "reconstruction",
    picture: Annotated[str, typer.Option("--format", help="Of pictures: jpg, png or webp.")] = "jpg",
    quality: Annotated[int, typer.Option(help="Of jpg and webp, 1 to 100.")] = 95,
    resize: Annotated[int | None, typer.Option(help="Scale the shorter side to so many pixels.")] = None,
    crop: Annotated[int | None, typer.Option(help="Take the middle square of so many pixels.")] = None,
    augment: Annotated[int, typer.Option(help="N random crops of --crop pixels a sample, in place of one.")] = 0,
    replace_fraction: Annotated[
        float, typer.Option(help="Swap this share of the tokens for random others, by the sample's key.")
    ] = 0.0,
    variants: Annotated[int, typer.Option(help="How often, for each view.")] = 1,
    seed: Annotated[int, typer.Option(help="Of crops and swapped tokens.")] = 0,
    keep: Annotated[
        str | None,
        typer.Option(help="Fields to copy, cls,json. [default: all but the picture]", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(help="Codecs at work: one a GPU.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Workers on Ray, on the cluster of RAY_ADDRESS or one of their own.")
    ] = False,
    gpus: Annotated[
        float | None,
        typer.Option(help="GPUs of a worker on Ray; 0.5: two share one. [default: 1]"),
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="fail: the first bad sample ends the job; skip: it is left out and listed.")
    ] = "fail",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what DST holds of another codec or other settings.")
    ] = False,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Read what is there, and make again what was changed.")
    ] = False,
    pictures_a_shard: Annotated[int, typer.Option(help="Where SRC is a folder of pictures.")] = 1000,
    engine: Annotated[str, typer.Option(help="auto, torch, cpu, onnx or reference.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, tf32, mixed, fp16 or bf16.")] = "auto",
    tricks: Annotated[str, typer.Option(help="auto, all, none, all,-graphs, ...")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of the engine; 0 for all cores.")] = 0,
) -> None:
    """Discretize a dataset once: each shard of SRC becomes a shard of the same name in DST.

    May be killed at any moment: the same command goes on with the shards that are missing, and ends with the same
    bytes. DST/manifest says what each shard holds, DST/contact-sheet.html shows 64 samples beside their Q(x).
    """
    # before torch is loaded: its threads would spin while they wait, and take the cores from who has work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if on_error not in ("fail", "skip"):
        typer.echo(f"dat precompute: --on-error is {on_error!r}, must be fail or skip", err=True)
        raise typer.Exit(1)

    from dat_workers.codecs.spec import CodecError
    from dat_workers.engines.config import EngineConfig
    from dat_workers.precompute import SampleFailed
    from dat_workers.precompute import precompute as run

    typer.echo(f"loading {codec} ...", err=True)
    try:
        with stopped_by_sigterm(), progress() as report:
            summary = run(
                source, dst, codec=codec, outputs=outputs.split(","), picture=picture, quality=quality,
                resize=resize, crop=crop, augment=augment, replace_fraction=replace_fraction, variants=variants,
                seed=seed, keep=None if keep is None else [f for f in keep.split(",") if f], workers=workers,
                ray=ray, gpus=gpus, skip=on_error == "skip", overwrite=overwrite, check_hashes=check_hashes,
                pictures_a_shard=pictures_a_shard,
                engine_config=EngineConfig(engine, device, dtype, tricks, threads), report=report,
            )  # fmt: skip
    except SampleFailed as error:
        typer.echo(f"dat precompute: {error}\n--on-error skip leaves such samples out", err=True)
        raise typer.Exit(1) from None
    except (CodecError, ValueError, OSError, RuntimeError) as error:
        typer.echo("\n".join([f"dat precompute: {error}", *getattr(error, "__notes__", ())]), err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise typer.Exit(130) from None
    say(summary, dst)


def say(summary: Summary, dst: str) -> None:
    """The summary, and the first of what was skipped."""
    made = summary.shards - summary.shards_kept
    rate = f", {summary.images / summary.seconds:.1f} images/s" if summary.images and summary.seconds else ""
    typer.echo(
        f"{dst}: {summary.samples} samples in {summary.shards} shards, {summary.nbytes / 1e6:.1f} MB, "
        f"codec {summary.fingerprint[:12]}\n"
        f"this run: {made} shards, {summary.images} images in {duration(summary.seconds)}{rate}; "
        f"{summary.shards_kept} shards were there"
    )
    if summary.workers_lost:
        typer.echo(f"{summary.workers_lost} times a worker ended, and its shard was made again")
    if summary.others:
        typer.echo(f"{summary.others} more shards in {dst}/manifest are not of this source")
    if summary.skipped:
        typer.echo(f"{summary.skipped} samples skipped:")
        for shard, key, reason in summary.skipped_first:
            typer.echo(f"  {shard}, {key or 'after the last sample'}: {reason}")
        if summary.skipped > len(summary.skipped_first):
            typer.echo(f"  ... all of them in {dst}/manifest")
    typer.echo(f"look at {dst}/contact-sheet.html before you train on it")


class Rate:
    """Images and bytes a second over the last half minute, and the time that is left."""

    def __init__(self) -> None:
        self._seen: list[JobProgress] = []

    def line(self, state: JobProgress) -> str:
        if self._seen and state.seconds < self._seen[-1].seconds:
            self._seen.clear()  # it has looked at what was there, and begins to work
        self._seen.append(state)
        while len(self._seen) > 2 and state.seconds - self._seen[0].seconds > RATE_OVER_S:
            self._seen.pop(0)
        first = self._seen[0]
        seconds = state.seconds - first.seconds or state.seconds or 1e-9
        images = (state.images - first.images) / seconds if len(self._seen) > 1 else 0.0
        share = (state.share - first.share) / seconds if len(self._seen) > 1 else 0.0
        left = duration((1 - state.share) / share) if share > 0 else "?"
        said = (
            f"{state.share:.1%}, {images:.1f} images/s, {left} left, {state.shards_done} of {state.shards} shards"
        )
        if state.skipped:
            said += f", {state.skipped} skipped"
        if state.workers_lost:
            said += f", {state.workers_lost} workers lost"
        return said


@contextlib.contextmanager
def progress() -> Iterator[Callable[[JobProgress], None]]:
    """A bar where there is a terminal, else a line a minute; both on stderr."""
    rate = Rate()
    if not sys.stderr.isatty():
        said = time.monotonic()

        def tell(state: JobProgress) -> None:
            nonlocal said
            line = rate.line(state)
            if time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                typer.echo(line, err=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda state: bar.update(task, completed=state.share, description=rate.line(state))


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the job as Ctrl-C does: nothing half written is left."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def duration(seconds: float) -> str:
    """`h:mm:ss`, or seconds below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
