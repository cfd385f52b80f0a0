"""`dat train-codec`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train_codec(
    shards: Annotated[
        list[Path],
        typer.Argument(help="WebDataset shards (.tar) or folders of pictures.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log, samples and the codec.")],
    name: Annotated[str, typer.Option(help="The codec's name.")] = "my-f8",
    validate: Annotated[
        list[Path] | None, typer.Option(help="Shards that are never trained on; PSNR is measured on them.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches in all.")] = 10_000,
    batch: Annotated[int, typer.Option(help="Crops a batch.")] = 32,
    crop: Annotated[int, typer.Option(help="Side of a crop in pixels.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its highest.")] = 5e-4,
    ch: Annotated[int, typer.Option(help="Channels at full size, a multiple of 32.")] = 32,
    ch_mult: Annotated[str, typer.Option(help="Multiples of --ch, one a level; f is 2^(levels-1).")] = "1,1,2,4",
    res_blocks: Annotated[int, typer.Option(help="Residual blocks a level.")] = 1,
    codebook_size: Annotated[int, typer.Option(help="K, up to 65536.")] = 16384,
    latent_dim: Annotated[int, typer.Option(help="d, the size of a codebook vector.")] = 4,
    codebook_start: Annotated[float, typer.Option(help="Share of the run before the codebook.")] = 0.05,
    discriminator_start: Annotated[float, typer.Option(help="Share of the run before the discriminator.")] = 0.85,
    discriminator_weight: Annotated[float, typer.Option(help="Its weight beside λ of Eq. 10; 0: none.")] = 0.1,
    perceptual: Annotated[
        str,
        typer.Option(help="`structure` (multi-scale L1 + SSIM), or `lpips` where its weights are at hand."),
    ] = "structure",
    perceptual_weight: Annotated[float, typer.Option(help="Weight of that term beside the squared error.")] = 0.02,
    pool: Annotated[int, typer.Option(help="Decoded pictures held in memory.")] = 2000,
    init: Annotated[
        Path | None, typer.Option(help="Start from this codec file of the same geometry, codebook included.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and crops.")] = 0,
    half: Annotated[
        bool, typer.Option("--half", help="Keep weights as fp16 (not the codebook): half the file.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
) -> None:
    """Train a VQGAN codec by Appendix A of the paper (Eq. 8-10).

    The same command goes on where an earlier one was stopped or killed. At the end OUT/NAME.safetensors can be
    installed with `dat codecs import OUT/NAME.safetensors --as NAME`.
    """

    from dat_service.cli.codecs import told
    from dat_workers.codecs.file import Origin, read, write
    from dat_workers.codecs.spec import CodecError, CodecSpec
    from dat_workers.codecs.store import check_name, load_model
    from dat_workers.engines.factory import pick_device
    from dat_workers.training.config import TrainConfig
    from dat_workers.training.export import exported_weights
    from dat_workers.training.trainer import Trainer

    try:
        check_name(name)
        spec = CodecSpec(
            name,
            ch=ch,
            ch_mult=tuple(int(m) for m in ch_mult.split(",")),
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
            device=str(pick_device(device)),
        )  # fmt: skip
        typer.echo(f"reading pictures for {name} ...")
        trainer = Trainer(config)
        finished = trainer.run(typer.echo)
        if finished and not trainer.codebook_ready:
            raise CodecError(f"{steps} steps are too few: the codebook never started; nothing was written")
    except (CodecError, ValueError, OSError, RuntimeError, FloatingPointError) as error:
        typer.echo(f"dat train-codec: {error}", err=True)
        raise typer.Exit(1) from None
    if not finished:
        raise typer.Exit(130)
    path = out / f"{name}.safetensors"
    with told():
        write(
            path,
            spec,
            exported_weights(trainer.average, half=half),
            Origin.now(f"dat train-codec, {steps} steps, seed {seed}", ""),
        )
        typer.echo(f"codec: {path}\ninstall it: dat codecs import {path} --as {name}")
        if trainer.validation is not None:
            scores = trainer.evaluate(model=load_model(read(path)).to(trainer.device))
            typer.echo(
                f"validation: {scores.psnr_db:.2f} dB on {scores.pictures} pictures, "
                f"{scores.codebook_share:.1%} of {codebook_size} codebook entries in use"
            )
