"""`dat codecs verify` compares every engine and dtype on this machine with the published modules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dat_service.cli import options
from dat_service.cli.errors import FAILED, command_errors
from dat_service.cli.output import check_output_file, log, print_left_out, print_table, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from dat_workers.verify.survey import Row

COLUMNS = ("engine", "dtype", "tokens", "fidelity", "own Q(x)", "PSNR dB", "largest", "not finite", "images/s", "")


@command_errors("dat codecs verify")
def verify(
    name: Annotated[str, Argument(metavar="NAME", help="Name of an embedded or installed codec.")],
    pictures: Annotated[
        list[str] | None,
        Argument(
            metavar="PICTURES",
            help="Pictures, folders or .tar shards to compare on.  [default: photographs of scikit-image]",
        ),
    ] = None,
    engine: Annotated[list[str] | None, Option(help="Compare only this engine; may be repeated.")] = None,
    device: options.Device = "auto",
    dtype: Annotated[
        list[str] | None, Option(help="Compare only this dtype (auto: the default one); may be repeated.")
    ] = None,
    crop: Annotated[
        int, Option(help="Side of the centre crops in pixels, a multiple of f.", min=8, max=4096)
    ] = 224,
    limit: Annotated[int, Option(help="Largest number of pictures to compare on.", min=1)] = 8,
    gradients: Annotated[
        Path | None, Option(help="File .npy of float [N,3,crop,crop]: the loss's gradient at each Q(x).")
    ] = None,
    on_error: options.OnError = "fail",
    upright: options.Upright = False,
    json_file: Annotated[Path | None, Option("--json", help="Also write the table to this JSON file.")] = None,
) -> None:
    """Compare engines and dtypes with the published modules.

    The published modules are those of taming-transformers, in fp32 and on the CPU, also where engines on a GPU are
    compared; on a GPU they may round more coarsely. Tokens and pictures are compared. Without
    --engine and --dtype, every engine and dtype that runs on this machine is compared, and the exit status is 1 if
    the default engine and dtype do not pass. With --engine or --dtype, the exit status is 1 if any of the engines
    or dtypes that these options name does not pass.
    """
    from dat_client.dataset_format.left_out import LeftOut
    from dat_workers.codecs.store import CodecStore, load_model
    from dat_workers.engines.config import ENGINE_DTYPES, ENGINES
    from dat_workers.errors import InvalidInput
    from dat_workers.images.crops import sample_crops
    from dat_workers.verify.agreement import (
        STAND_IN_CLASSIFIER,
        reference_engine,
        reference_outputs,
        stand_in_gradients,
    )
    from dat_workers.verify.survey import deciding_rows, fastest_passing, survey

    for option, values, known in (("--engine", engine, ENGINES), ("--dtype", dtype, ENGINE_DTYPES)):
        for value in values or ():
            if value not in known:
                raise InvalidInput(option, repr(value), f"one of {', '.join(known)}")
    check_output_file("--json", json_file)
    file = CodecStore().load(name)
    if crop % file.spec.factor:
        raise InvalidInput("--crop", crop, f"a multiple of f = {file.spec.factor}")
    model = load_model(file)
    reference = reference_engine(load_model(file))
    left_out = LeftOut()
    images = sample_crops(pictures, crop, limit, skip=options.skips(on_error), upright=upright, left_out=left_out)
    print_left_out(left_out.rows)
    stored_gradients = None if gradients is None else _read_gradients(gradients, images.shape)
    log(f"computing the reference on the CPU, for {len(images)} pictures")
    expected = reference_outputs(
        reference,
        images.astype("float32") / 255,
        stand_in_gradients if stored_gradients is None else lambda q: stored_gradients,
    )
    rows = survey(model, expected, device=device, engines=engine or (), dtypes=dtype or (), report=log)
    best = fastest_passing(rows)
    deciding = deciding_rows(rows, engines=bool(engine), dtypes=bool(dtype))
    facts: dict[str, Any] = {
        "codec": name,
        "fingerprint": file.fingerprint,
        "reference": f"taming-transformers' modules, fp32 on {reference.device}",
        "pictures": f"{len(images)} centre crops of {crop} x {crop}",
        "step": "easyrobust: α = 0.1, l2, from Q(x)",
        "gradients": STAND_IN_CLASSIFIER if gradients is None else gradients.name,
        "tokens": expected.indices.numel(),
        "tokens_changed": int(expected.changed.sum()) if expected.changed is not None else 0,
    }
    _print(facts, rows)
    for row in deciding:
        verdict = "TOO FEW TOKENS" if row.undecided else "FAIL"
        typer.echo(f"{row.name}: {f'{verdict}: {row.shortfall}' if row.shortfall else 'PASS'}")
        if row.undecided and row.agreement is not None:
            more = math.ceil(len(images) * row.agreement.pictures_factor)
            typer.echo(f"compare more pictures: name some after the codec, with --limit {more}")
    typer.echo(f"the fastest that passes: {best.name if best else 'none'}")
    if json_file is not None:
        table = {"rows": [row.to_dict() for row in rows], "fastest_that_passes": best.name if best else None}
        write_json(json_file, facts | table)
    if not deciding or any(row.shortfall for row in deciding):
        raise typer.Exit(FAILED)


def _read_gradients(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Returns the gradients in a .npy file as fp32. Raises InvalidInput unless they have this shape, [N,3,H,W]."""
    import numpy as np
    import torch

    from dat_workers.errors import InvalidInput
    from dat_workers.request import check_gradients

    with path.open("rb") as file:
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # numpy raises errors of many kinds for damaged files
            raise InvalidInput("--gradients", path, f"a readable .npy file of numbers ({error})") from error
    check_gradients(array, None, shape)
    return torch.from_numpy(array).float()


def _print(facts: dict[str, Any], rows: list[Row]) -> None:
    from rich.table import Table

    for key in ("codec", "reference", "pictures", "step", "gradients"):
        fingerprint = f", fingerprint {facts['fingerprint'][:12]}" if key == "codec" else ""
        typer.echo(f"{key:10}{facts[key]}{fingerprint}")
    typer.echo(f"δ changes {facts['tokens_changed']} of {facts['tokens']} tokens of Q(x) in the reference")
    table = Table(*COLUMNS, box=None)
    for row in rows:
        agreement = row.agreement
        if agreement is None:
            table.add_row(row.engine, row.dtype, *[""] * 7, f"not run: {row.error}")
            continue
        table.add_row(
            row.engine, row.dtype, f"{agreement.token_agreement:.3%}", _percentage(agreement.fidelity),
            _percentage(agreement.own_fidelity), f"{agreement.psnr_db:.1f}",
            f"{agreement.largest_difference:.1e}", str(agreement.non_finite),
            "–" if row.images_per_s is None else f"{row.images_per_s:.3g}",
            ("default, " if row.default else "") + _verdict(row),
        )  # fmt: skip
    print_table(table)
    for row in rows:
        if row.overflow:
            typer.echo(f"{row.name} overflows in {row.overflow}")


def _verdict(row: Row) -> str:
    if row.undecided:
        return f"cannot be judged: {row.shortfall}"
    return f"falls short: {row.shortfall}" if row.shortfall else "passes"


def _percentage(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
