"""`dat serve` serves codecs over HTTP, either on Ray Serve or in one process."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from typer import Option

from dat_service.cli.errors import FAILED, command_errors
from dat_service.cli.options import setting
from dat_service.settings import Settings, SettingsError, make_settings
from dat_service.signals import STOP, Requests, handled_signals, requested_by_signals
from dat_workers.system.ray_cluster import check_cluster


@command_errors("dat serve")
def serve(
    context: typer.Context,
    codec: Annotated[
        list[str] | None, Option(help="Codec to serve; if repeated, each is at /NAME.  [default: tiny-f8]")
    ] = None,
    port: Annotated[int | None, setting("port")] = None,
    host: Annotated[str | None, setting("host")] = None,
    local: Annotated[bool, Option("--local", help="Serve one codec in this process, without Ray.")] = False,
    engine: Annotated[str | None, setting("engine")] = None,
    device: Annotated[str | None, setting("device")] = None,
    dtype: Annotated[str | None, setting("dtype")] = None,
    tricks: Annotated[str | None, setting("tricks")] = None,
    threads: Annotated[int | None, setting("threads")] = None,
    api_key_file: Annotated[Path | None, setting("api_key_file")] = None,
    replicas: Annotated[int | None, setting("replicas")] = None,
    autoscale: Annotated[str | None, setting("autoscale", metavar="MIN:MAX")] = None,
    gpus: Annotated[float | None, setting("gpus")] = None,
    max_wait_ms: Annotated[float | None, setting("max_wait_ms")] = None,
    max_queue_s: Annotated[float | None, setting("max_queue_s")] = None,
    max_requests: Annotated[int | None, setting("max_requests")] = None,
    body_timeout_s: Annotated[float | None, setting("body_timeout_s")] = None,
    min_body_rate: Annotated[int | None, setting("min_body_rate")] = None,
    log_format: Annotated[str | None, setting("log_format")] = None,
    serve_config: Annotated[
        str | None,
        Option(metavar="FILE", help="Write Ray's `serve deploy` configuration to FILE (- for stdout), and exit."),
    ] = None,
) -> None:
    """Serve codecs over HTTP until Ctrl-C.

    SIGHUP loads the codecs again from the folder of installed codecs. Every setting in
    dat_service/settings.py can also be set by an environment variable, such as DAT_PORT or DAT_MAX_IMAGES. If a
    setting has both an option and a variable, the option takes precedence.
    """
    # This must be set before torch is loaded: otherwise torch's threads spin while they wait, and so take the cores
    # from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # This must be set before Ray is loaded: otherwise, if no Ray is running, Ray's functions start one with default
    # options, even after the service has ended.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    flags: dict[str, Any] = {k: v for k, v in context.params.items() if k in Settings.model_fields}
    all_settings = [make_settings(**flags | {"codec": name}) for name in codec or (None,)]
    if serve_config is not None:
        _write_serve_config(all_settings, serve_config)
        return
    requests = Requests()
    with handled_signals(requests):
        _check_startable(all_settings, local=local)
        if local:
            _serve_local(all_settings[0], requests)
        else:
            _serve_on_ray(all_settings, requests)


def _write_serve_config(all_settings: list[Settings], path: str) -> None:
    """Writes the configuration for Ray Serve as YAML to the file `path`, or to stdout if `path` is "-"."""
    import yaml

    from dat_service.ray.deployments import serve_config

    text = yaml.safe_dump(serve_config(all_settings), sort_keys=False)
    if path == "-":
        typer.echo(text, nl=False)
    else:
        Path(path).write_text(text)


def _check_startable(all_settings: list[Settings], *, local: bool) -> None:
    """Raises ValueError or OSError for faults that would otherwise show late, such as a port in use."""
    cluster = None if local else os.environ.get("RAY_ADDRESS")
    if cluster:
        check_cluster(cluster)  # before the imports below, which take seconds

    from dat_service.http.auth import read_keys
    from dat_service.observability import tracing
    from dat_workers.codecs.store import CodecStore

    settings = all_settings[0]
    if not local:
        from dat_service.ray.deployments import check

        check(all_settings)
    elif len(all_settings) > 1 or settings.replicas > 1 or settings.autoscale is not None or settings.gpus:
        raise SettingsError("--local serves one codec in one process, without replicas, autoscale or gpus")
    _ = settings.engine_config  # this raises ValueError if the engine settings are unusable
    for each in all_settings:
        CodecStore().load(each.codec)
    read_keys(settings.api_key_file)
    tracing.wanted()
    if cluster:
        return  # Ray Serve listens on the cluster's nodes, and it may be doing so already
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((settings.host, settings.port))
        except (OSError, TypeError) as error:  # TypeError: the host name cannot be encoded
            raise OSError(f"cannot listen on address {settings.host!r}, port {settings.port}: {error}") from None


def _print_ready(urls: dict[str, str], seconds: float) -> None:
    """Prints the "ready" line, which tells scripts and people that the service answers, and its addresses."""
    places = ", ".join(f"{codec} at {url}" for codec, url in urls.items())
    first = next(iter(urls.values()))
    typer.echo(f"ready after {seconds:.1f} s: {places}, try it at {first}/, Ctrl-C ends it")


def _serve_local(settings: Settings, requests: Requests) -> None:
    """Serves one codec in this process until SIGINT or SIGTERM; each SIGHUP loads the codec again."""
    from dat_service.http.local import LocalServer
    from dat_service.ports import http_url

    started = time.monotonic()
    urls = {settings.codec: http_url(settings.host, settings.port)}
    typer.echo(f"loading {settings.codec} ...")
    server = LocalServer(settings, on_ready=lambda: _print_ready(urls, time.monotonic() - started))

    def await_requests() -> None:
        until_stop(server, requests)
        server.should_exit = True

    with requested_by_signals(requests):
        threading.Thread(target=await_requests, daemon=True).start()
        server.run()
    if not server.started:
        raise typer.Exit(FAILED)
    typer.echo("stopped")


def _serve_on_ray(all_settings: list[Settings], requests: Requests) -> None:
    """Serves the codecs on Ray Serve until SIGINT or SIGTERM; each SIGHUP loads the codecs again."""
    from dat_service.ray.service import RayService

    started = time.monotonic()
    service = RayService(*all_settings)
    typer.echo(f"starting {', '.join(s.codec for s in all_settings)} on Ray Serve ...")
    try:
        service.start()
        # These handlers are set after the start, because Ray sets its own handler for SIGTERM while it starts.
        with requested_by_signals(requests):
            _print_ready(service.urls, time.monotonic() - started)
            until_stop(service, requests)
            typer.echo("stopping ...")
            service.stop()
    finally:
        service.stop()
    typer.echo("stopped")


class Updatable(Protocol):
    """A service that can load its codecs again."""

    def update(self) -> None: ...


def until_stop(service: Updatable, requests: Requests) -> None:
    """Updates the service in a thread for each "update" in the queue, and returns after a "stop".

    If updates are requested during an update, one or several, one more update follows.
    """
    updates = Requests()
    threading.Thread(target=run_updates, args=[service, updates], daemon=True).start()
    while (request := requests.get()) != STOP:
        updates.put(request)


def run_updates(service: Updatable, requested: Requests) -> None:
    """Loads the codecs again for each item in the queue, once for all that wait there; never returns.

    If an update fails, the error is printed and the old codecs stay.
    """
    while requested.get():
        while not requested.empty():
            requested.get()
        started = time.monotonic()
        typer.echo("updating ...")
        try:
            service.update()
        except Exception as error:  # whatever it is, the next update must be possible
            typer.echo(f"dat serve: not updated: {str(error) or type(error).__name__}", err=True)
        else:
            typer.echo(f"updated after {time.monotonic() - started:.1f} s")
