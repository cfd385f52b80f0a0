"""`dat train-codec` trains a VQGAN codec on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import INTERRUPTED, command_errors
from dat_service.cli.output import print_left_out


@command_errors("dat train-codec", interrupted="interrupted; the same command continues from the last checkpoint")
def train_codec(
    shards: Annotated[
        list[str],
        Argument(help="WebDataset shards, folders of shards or of pictures, patterns and addresses to train on."),
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
    continues it. Install the result with `dat codecs import OUT/NAME.safetensors --as NAME`.
    """
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
    typer.echo(f"reading pictures for {name} ...")
    trainer = Trainer(config)
    print_left_out(trainer.left_out.rows)
    if not trainer.run(typer.echo):
        raise typer.Exit(INTERRUPTED)
    if not trainer.codebook_ready:
        raise CodecError(f"{steps} steps are too few to start the codebook, so no codec was written")
    path = out / f"{name}.safetensors"
    origin = Origin.now(f"dat train-codec, {steps} steps, seed {seed}", "")
    write(path, spec, exported_weights(trainer.average, half=half), origin)
    typer.echo(f"codec: {path}\ninstall it: dat codecs import {path} --as {name}")
    if trainer.validation is not None:
        scores = trainer.evaluate(model=load_model(read(path)).to(trainer.device))
        typer.echo(
            f"validation: {scores.psnr_db:.2f} dB on {scores.pictures} pictures, "
            f"{scores.codebook_share:.1%} of {codebook_size} codebook entries in use"
        )
