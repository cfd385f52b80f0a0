"""`dat train-codec` trains a VQGAN codec on pictures."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import INTERRUPTED, command_errors
from dat_service.cli.output import MovingRate, live_progress, log, print_left_out, time_left

if TYPE_CHECKING:
    from dat_workers.training.progress import TrainProgress


@command_errors("dat train-codec", interrupted="interrupted; the same command continues from the last checkpoint")
def train_codec(
    shards: Annotated[
        list[str],
        Argument(
            metavar="SHARDS",
            help="WebDataset shards, folders of shards or of pictures, patterns and addresses to train on.",
        ),
    ],
    out: Annotated[Path, Option(help="Folder for the checkpoint, the log, the sample pictures and the codec.")],
    name: Annotated[str, Option(help="Name of the new codec.")] = "my-f8",
    validate: Annotated[
        list[str] | None, Option(help="Shards to measure PSNR on, never trained on; may be repeated.")
    ] = None,
    steps: Annotated[int, Option(help="Total number of training steps; each step trains on one batch.")] = 10_000,
    batch: Annotated[int, Option(help="Number of crops in a batch.")] = 32,
    crop: Annotated[int, Option(help="Height and width of a crop in pixels.")] = 64,
    learning_rate: Annotated[float, Option(help="Highest learning rate of AdamW.")] = 5e-4,
    ch: Annotated[int, Option(help="Number of channels at full resolution, a multiple of 32.")] = 32,
    ch_mult: Annotated[str, Option(help="Multiples of --ch, one for each level; f is 2^(levels - 1).")] = "1,1,2,4",
    res_blocks: Annotated[int, Option(help="Number of residual blocks at each level.")] = 1,
    codebook_size: Annotated[int, Option(help="Number K of codebook entries, at most 65536.")] = 16384,
    latent_dim: Annotated[int, Option(help="Length d of a codebook entry, which is a vector.")] = 4,
    codebook_start: Annotated[float, Option(help="Share of the steps before the codebook is used.")] = 0.05,
    discriminator_start: Annotated[
        float, Option(help="Share of the steps before the discriminator is used.")
    ] = 0.85,
    discriminator_weight: Annotated[
        float, Option(help="Factor of λ, the weight of the adversarial term in Eq. 10; 0 for no discriminator.")
    ] = 0.1,
    perceptual: Annotated[
        str, Option(help="Perceptual term: structure (multi-scale L1 and SSIM) or lpips (pip install lpips).")
    ] = "structure",
    perceptual_weight: Annotated[float, Option(help="Perceptual weight; the squared error has 1.")] = 0.02,
    pool: Annotated[int, Option(help="Number of decoded pictures that are held in memory.")] = 2000,
    init: Annotated[
        Path | None, Option(help="Codec file of the same geometry to start from, codebook included.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the initial weights and of the random crops.")] = 0,
    half: Annotated[
        bool, Option("--half", help="Write all weights but the codebook as fp16, which halves the file size.")
    ] = False,
    device: options.Device = "auto",
    on_error: options.OnError = "fail",
    upright: options.Upright = False,
) -> None:
    """Train a VQGAN codec on pictures.

    The losses are those of Appendix A of the DAT paper (Eq. 8-10). If a run was stopped or killed, the same command
    continues it. While it runs, OUT/samples shows crops above their reconstructions, and OUT/loss.svg the terms of
    the loss. Install the result with `dat codecs import OUT/NAME.safetensors --as NAME`.
    """
    log(f"preparing the training of {name} ...")  # loading PyTorch takes seconds

    from dat_workers.codecs.file import Origin, read, write
    from dat_workers.codecs.spec import CodecError, CodecSpec
    from dat_workers.codecs.store import check_name, load_model
    from dat_workers.engines.factory import pick_device
    from dat_workers.errors import InvalidInput
    from dat_workers.training.config import TrainConfig
    from dat_workers.training.export import exported_weights
    from dat_workers.training.trainer import Trainer

    check_name(name)
    try:
        multiples = tuple(int(multiple) for multiple in ch_mult.split(","))
    except ValueError as error:
        raise InvalidInput("--ch-mult", repr(ch_mult), "whole numbers with commas, such as 1,1,2,4") from error
    spec = CodecSpec(
        name,
        ch=ch,
        ch_mult=multiples,
        num_res_blocks=res_blocks,
        codebook_size=codebook_size,
        latent_dim=latent_dim,
        z_channels=latent_dim,
        licence="your own",
        summary=f"trained by dat train-codec, {steps} steps",
    )
    config = TrainConfig(
        spec, tuple(shards), out, steps=steps, batch=batch, crop=crop, learning_rate=learning_rate,
        codebook_start=codebook_start, discriminator_start=discriminator_start,
        discriminator_weight=discriminator_weight, perceptual=perceptual,
        perceptual_weight=perceptual_weight, pool=pool, init=init, validation=tuple(validate or ()), seed=seed,
        device=str(pick_device(device)), skip=options.skips(on_error), upright=upright,
    )  # fmt: skip
    with closing(_ProgressBars(batch)) as bars:
        trainer = Trainer(config, bars.show)
        bars.close()
        print_left_out(trainer.left_out.rows)
        left_out = trainer.left_out.total
        if trainer.log.dropped:
            log(f"{trainer.log.path}: removing {trainer.log.dropped} lines after step {trainer.step}")
        if trainer.step:
            log(f"continuing from step {trainer.step} of {steps}")
        finished = trainer.run()
    if trainer.left_out.total > left_out:  # more pictures than the pool holds are read during the run
        print_left_out(trainer.left_out.rows)
    if not finished:
        log(f"stopped at step {trainer.step}; run the same command to continue")
        raise typer.Exit(INTERRUPTED)
    if not trainer.codebook_ready:
        raise CodecError(f"{steps} steps are too few to start the codebook, so no codec was written")
    path = out / f"{name}.safetensors"
    origin = Origin.now(f"dat train-codec, {steps} steps, seed {seed}", "")
    write(path, spec, exported_weights(trainer.average, half=half), origin)
    typer.echo(
        f"samples: {out / 'samples'}\nloss curve: {trainer.log.curve}\n"
        f"codec: {path}\ninstall it: dat codecs import {path} --as {name}"
    )
    if trainer.validation is not None:
        scores = trainer.evaluate(model=load_model(read(path)).to(trainer.device))
        typer.echo(
            f"validation: {scores.psnr_db:.2f} dB on {scores.pictures} pictures, "
            f"{scores.codebook_share:.1%} of {codebook_size} codebook entries in use"
        )


class _ProgressBars:
    """Shows the progress of a training whose batches have `batch` crops.

    Each activity has a bar of its own, or, in a log, lines of its own.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._bar = ExitStack()
        self._activity = ""

    def show(self, progress: TrainProgress) -> None:
        """Shows the progress; another activity than before ends the bar and begins one."""
        if progress.activity != self._activity:
            self.close()
            self._show = self._bar.enter_context(live_progress(plain_every_s=60))
            self._rate = MovingRate()
            self._activity = progress.activity
        (per_second,) = self._rate.per_second(time.monotonic(), progress.done)
        share = None if progress.total is None else progress.done / progress.total
        self._show(share, _progress_text(progress, per_second, self._batch))

    def close(self) -> None:
        """Ends the bar; in a log, the last text of the activity is printed."""
        self._bar.close()
        self._activity = ""


def _progress_text(progress: TrainProgress, per_second: float, batch: int) -> str:
    """Returns the progress as one line; `per_second` is how fast `progress.done` grows."""
    if progress.total is None:
        return f"{progress.activity}: {progress.done} so far, {per_second:.1f} {progress.unit}/s"
    left = time_left(progress.total - progress.done, per_second)
    if progress.terms:
        terms = ", ".join(_term(name, value) for name, value in progress.terms.items())
        return f"step {progress.done}/{progress.total}, {per_second * batch:.1f} images/s, {left}, {terms}"
    if progress.done == progress.total:
        return f"{progress.activity}: {progress.total} {progress.unit}"
    return f"{progress.activity}: {progress.done} of {progress.total} {progress.unit}, {left}"


def _term(name: str, value: float) -> str:
    if name.endswith("psnr_db"):
        return f"{'validation' if name.startswith('validation') else 'crops'} {value:.2f} dB"
    return f"{name} {value:.0%}" if name == "codebook" else f"{name} {value:.4f}"
