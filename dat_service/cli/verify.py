"""`dat codecs verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from dat_workers.verify.survey import Row

COLUMNS = ("engine", "dtype", "tokens", "fidelity", "own Q(x)", "PSNR dB", "largest", "not finite", "images/s", "")


def verify(
    name: Annotated[str, typer.Argument(help="An embedded or installed codec.", show_default=False)],
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures, folders or .tar shards. [default: photographs inside scikit-image]"),
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Judge this engine only; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    dtype: Annotated[
        list[str] | None, typer.Option(help="Judge this dtype only (auto: the default one); may be repeated.")
    ] = None,
    crop: Annotated[int, typer.Option(help="Side of the centre crops, a multiple of f.", min=8, max=4096)] = 224,
    limit: Annotated[int, typer.Option(help="Most pictures taken.", min=1)] = 8,
    gradients: Annotated[
        Path | None, typer.Option(help=".npy, float [N,3,crop,crop]: the gradients at Q(x) of the pictures taken.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table to this file.")] = None,
) -> None:
    """Compare engines and dtypes with taming-transformers' modules in fp32, token by token.

    Without --engine and --dtype: all that this machine has. Status 1 where what runs by default (or with them:
    anything that was named) falls short.
    """
    from dat_service.cli.codecs import told
    from dat_workers.codecs.spec import CodecError
    from dat_workers.codecs.store import CodecStore, load_model
    from dat_workers.engines.config import ENGINE_DTYPES, ENGINES, EngineConfig
    from dat_workers.engines.factory import create
    from dat_workers.errors import InvalidInput
    from dat_workers.images.crops import sample_crops
    from dat_workers.verify.agreement import STAND_IN_CLASSIFIER, reference_outputs, stand_in_gradients
    from dat_workers.verify.survey import deciding_rows, fastest_passing, survey

    with told():
        try:
            for what, given, known in (("--engine", engine, ENGINES), ("--dtype", dtype, ENGINE_DTYPES)):
                for value in given or ():
                    if value not in known:
                        raise InvalidInput(what, repr(value), f"one of {', '.join(known)}")
            if json_file is not None and not json_file.absolute().parent.is_dir():
                raise InvalidInput("--json", json_file, "a file in a folder that is there")
            file = CodecStore().load(name)
            if crop % file.spec.factor:
                raise InvalidInput("--crop", crop, f"a multiple of f = {file.spec.factor}")
            model = load_model(file)
            reference = create(EngineConfig("reference", device), load_model(file))
            images = sample_crops(pictures, crop, limit)
            given_gradients = None if gradients is None else _read_gradients(gradients, images.shape)
            _say(f"computing the reference on {len(images)} pictures")
            expected = reference_outputs(
                reference,
                images.astype("float32") / 255,
                stand_in_gradients if given_gradients is None else lambda q: given_gradients,
            )
            rows = survey(model, expected, device=device, engines=engine or (), dtypes=dtype or (), report=_say)
        except (InvalidInput, ValueError, RuntimeError, OSError) as error:
            raise error if isinstance(error, CodecError) else CodecError(str(error)) from error
        source = STAND_IN_CLASSIFIER if gradients is None else gradients.name
        best = fastest_passing(rows)
        deciding = deciding_rows(rows, engines=bool(engine), dtypes=bool(dtype))
        short = [row for row in deciding if row.shortfall]
        facts: dict[str, Any] = {
            "codec": name,
            "fingerprint": file.fingerprint,
            "reference": f"taming-transformers' modules, fp32 on {reference.device}",
            "pictures": f"{len(images)} centre crops of {crop} x {crop}",
            "step": "easyrobust: α = 0.1, l2, from Q(x)",
            "gradients": source,
            "tokens": expected.indices.numel(),
            "tokens_changed": int(expected.changed.sum()) if expected.changed is not None else 0,
        }
        _print(facts, rows)
        for row in deciding:
            typer.echo(f"{row.name}: {'FAIL: ' + row.shortfall if row.shortfall else 'PASS'}")
        typer.echo(f"the fastest that passes: {best.name if best else 'none'}")
        if json_file is not None:
            _write(json_file, facts, rows, best)
        if short or not deciding:
            raise typer.Exit(1)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _read_gradients(path: Path, shape: tuple[int, ...]) -> Tensor:
    """fp32 [N,3,H,W] of a .npy file. Raises InvalidInput where it is not of that shape."""
    import numpy as np
    import torch

    from dat_workers.errors import InvalidInput
    from dat_workers.request import check_gradients

    with path.open("rb") as file:
        try:
            array = np.load(file, allow_pickle=False)
        except EOFError as error:
            raise InvalidInput("--gradients", path, "a .npy file; it is empty") from error
    if not isinstance(array, np.ndarray):
        raise InvalidInput("--gradients", path, "a .npy file of one array")
    check_gradients(array, None, shape)
    return torch.from_numpy(array).float()


def _print(facts: dict[str, Any], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    for key in ("codec", "reference", "pictures", "step", "gradients"):
        mark = f", fingerprint {facts['fingerprint'][:12]}" if key == "codec" else ""
        typer.echo(f"{key:10}{facts[key]}{mark}")
    typer.echo(f"δ changes {facts['tokens_changed']} of {facts['tokens']} tokens of Q(x) in the reference")
    table = Table(*COLUMNS, box=None)
    for row in rows:
        a = row.agreement
        if a is None:
            table.add_row(row.engine, row.dtype, *[""] * 7, f"not run: {row.error}")
            continue
        table.add_row(
            row.engine, row.dtype, f"{a.token_agreement:.3%}", _share(a.fidelity), _share(a.own_fidelity),
            f"{a.psnr_db:.1f}", f"{a.largest_difference:.1e}", str(a.non_finite),
            "–" if row.images_per_s is None else f"{row.images_per_s:.3g}",
            ("default, " if row.default else "") + (f"falls short: {row.shortfall}" if row.shortfall else "passes"),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
    for row in rows:
        if row.overflow:
            typer.echo(f"{row.name} overflows in {row.overflow}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _write(path: Path, facts: dict[str, Any], rows: list[Row], best: Row | None) -> None:
    from dat_workers.system.files import write_atomically

    table = {"rows": [row.to_dict() for row in rows], "fastest_that_passes": best.name if best else None}
    write_atomically(path, (json.dumps(facts | table, indent=1, ensure_ascii=False) + "\n").encode())
