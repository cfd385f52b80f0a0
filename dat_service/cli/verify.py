"""`dat codecs verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def verify(
    name: Annotated[str, typer.Argument(help="An embedded or installed codec.", show_default=False)],
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures, folders or .tar shards. [default: photographs inside scikit-image]"),
    ] = None,
    engine: Annotated[str, typer.Option(help="The engine to judge: auto, torch, cpu, onnx.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")] = "auto",
    crop: Annotated[int, typer.Option(help="Side of the centre crops, a multiple of f.", min=8, max=4096)] = 224,
    limit: Annotated[int, typer.Option(help="Most pictures taken.", min=1)] = 8,
) -> None:
    """Compare an engine with taming-transformers' modules in fp32, token by token: PASS, or FAIL and status 1."""
    from dat_service.cli.codecs import told
    from dat_workers.codecs.spec import CodecError
    from dat_workers.codecs.store import CodecStore, load_model
    from dat_workers.engines import create
    from dat_workers.errors import InvalidInput
    from dat_workers.verify import compare

    with told():
        try:
            file = CodecStore().load(name)
            if crop % file.spec.factor:
                raise InvalidInput("--crop", crop, f"a multiple of f = {file.spec.factor}")
            model = load_model(file)
            ours = create(engine, model, device=device, dtype=dtype)
            reference = create("reference", load_model(file), device=device)
            images = _crops(pictures, crop, limit)
        except (InvalidInput, ValueError, RuntimeError, OSError) as error:
            raise error if isinstance(error, CodecError) else CodecError(str(error)) from error
        typer.echo(f"codec              {name}, fingerprint {file.fingerprint[:12]}")
        typer.echo(f"engine             {ours.name}, {ours.dtype} on {ours.device}, against taming's modules, fp32")
        typer.echo(f"pictures           {len(images)} centre crops of {crop} x {crop}")
        result = compare(ours, reference, images.astype("float32") / 255)
        typer.echo(f"token agreement    {result.token_agreement:.4%}")
        typer.echo(f"PSNR of pictures   {result.psnr_db:.1f} dB, from the same tokens")
        typer.echo(f"largest difference {result.largest_difference:.2e} of 1")
        typer.echo(f"not finite         {result.non_finite} pictures")
        typer.echo("PASS" if result.passed else f"FAIL: {result.shortfall}")
        if not result.passed:
            raise typer.Exit(1)


def _crops(sources: list[Path] | None, size: int, limit: int) -> npt.NDArray[np.uint8]:
    import numpy as np

    from dat_workers.codecs.spec import CodecError
    from dat_workers.pictures import centre_crop, centre_crops

    if sources:
        return centre_crops(sources, size, limit)
    try:
        from skimage import data
    except ImportError:
        raise CodecError("name pictures to compare on, or: pip install 'dat-service[demo]'") from None
    names = PHOTOGRAPHS[:limit]
    pictures = (np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1)) for name in names)
    return np.stack([centre_crop(picture, size) for picture in pictures])
