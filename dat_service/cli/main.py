"""Assembles the command `dat`. Its subcommands import heavy packages only when they run, so `--help` is quick."""

from __future__ import annotations

import typer

from dat_service import __version__
from dat_service.cli import bench, codecs, discretize, precompute, serve, train, verify

app = typer.Typer(
    name="dat",
    help="Discrete augmentation data service: Q(x) of Discrete Adversarial Training, as a service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
    rich_markup_mode=None,  # rich would mistake "[default: 8000]" for markup and drop it
)
app.command("serve")(serve.serve)
app.command("discretize")(discretize.discretize)
app.command("precompute")(precompute.precompute)
app.command("export")(codecs.export)
app.command("train-codec")(train.train_codec)
app.add_typer(codecs.app, name="codecs")
codecs.app.command("verify")(verify.verify)
app.add_typer(bench.app, name="bench")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"dat {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass
