"""`dat bench`: benchmarks.

Each has its flags and its help beside what it measures; that of the codec must also run where typer is not
installed.
"""

from __future__ import annotations

import typer

app = typer.Typer(help="Benchmarks: codec, service, client.", no_args_is_help=True, pretty_exceptions_enable=False)

# flags go through untouched, --help too
THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("codec", context_settings=THROUGH, add_help_option=False)
def codec(context: typer.Context) -> None:
    """How fast Q is here, beside the published modules and diffusers, and whether it is still the same Q."""
    from dat_workers.bench.codec import main

    raise typer.Exit(main(context.args))


@app.command("service", context_settings=THROUGH, add_help_option=False)
def service(context: typer.Context) -> None:
    """How fast the service is here, beside FastAPI, Ray Serve, LitServe and the engine without a service."""
    try:
        from dat_service.bench.service import main
    except ModuleNotFoundError as error:
        typer.echo(f"dat bench service: {error}; pip install 'dat-service[bench]'", err=True)
        raise typer.Exit(1) from None

    raise typer.Exit(main(context.args))


@app.command("client", context_settings=THROUGH, add_help_option=False)
def client(context: typer.Context) -> None:
    """Where the time of a call goes: client, network, queue, codec, the rest of the server."""
    from dat_service.bench.client import main

    raise typer.Exit(main(context.args))
