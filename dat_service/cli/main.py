"""`dat`: the command line, one file a group of commands. Heavy imports stay inside the commands."""

from __future__ import annotations

import typer

from dat_service import __version__
from dat_service.cli import bench, codecs, discretize, export, precompute, serve, train, verify

app = typer.Typer(
    name="dat",
    help="Discrete augmentation data service: Q(x) of Discrete Adversarial Training, as a service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
codecs.app.command("verify")(verify.verify)
app.add_typer(codecs.app, name="codecs")
app.add_typer(bench.app, name="bench")
app.command("serve")(serve.serve)
app.command("discretize")(discretize.discretize)
app.command("precompute")(precompute.precompute)
app.command("export")(export.export)
app.command("train-codec")(train.train_codec)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dat {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Say and leave."),
) -> None:
    pass
