"""`dat serve`."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dat_service.settings import Settings, SettingsError, make_settings


def serve(
    codec: Annotated[
        str | None, typer.Option(help="Codec to serve (`dat codecs list`). [default: tiny-f8]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: 8000]")] = None,
    host: Annotated[str | None, typer.Option(help="Address; 0.0.0.0 for all. [default: 127.0.0.1]")] = None,
    local: Annotated[bool, typer.Option("--local", help="One process, without Ray.")] = False,
    engine: Annotated[
        str | None, typer.Option(help="auto, torch, cpu, onnx or reference. [default: torch on CUDA, else cpu]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1. [default: auto]")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, fp32, tf32, mixed, fp16, bf16. [default: mixed on CUDA, fp32 on CPU]"),
    ] = None,
    tricks: Annotated[
        str | None, typer.Option(help="all, none, all,-graphs, ... [default: all on CUDA, none on CPU]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine. [default: all cores]")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one API key a line. [default: no key is asked for]")
    ] = None,
) -> None:
    """Serve a codec over HTTP until Ctrl-C.

    Every option, and every limit in dat_service/settings.py, is also a variable: DAT_PORT, DAT_MAX_IMAGES, ...
    """
    try:
        settings = make_settings(
            codec=codec, port=port, host=host, engine=engine, device=device, dtype=dtype, tricks=tricks,
            threads=threads, api_key_file=api_key_file,
        )  # fmt: skip
        check_startable(settings)
    except (SettingsError, ValueError, OSError) as error:
        fail(error)
    if local:
        serve_local(settings)
    else:
        serve_on_ray(settings)


def check_startable(settings: Settings) -> None:
    """Raises what would only show later, and slowly: an unknown codec or trick, a taken port, bad keys, ..."""
    from dat_service import tracing
    from dat_service.security import read_keys
    from dat_workers.codecs.store import CodecStore
    from dat_workers.engines.tricks import Tricks

    Tricks.parse(settings.tricks, cuda=False)
    CodecStore().load(settings.codec)
    read_keys(settings.api_key_file)
    tracing.wanted()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((settings.host, settings.port))
        except (OSError, TypeError) as error:  # TypeError: a host name that is no text
            raise OSError(f"cannot listen on {settings.host!r}, port {settings.port}: {error}") from None


def say_ready(settings: Settings, seconds: float, prefix: str = "/") -> None:
    """The line that scripts and people wait for."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}{prefix.rstrip('/')}"
    typer.echo(f"ready after {seconds:.1f} s: {settings.codec} at {url}, try it at {url}/, Ctrl-C ends it")


def serve_local(settings: Settings) -> None:
    """The app under uvicorn in this process."""
    import uvicorn

    from dat_service.app import create_app
    from dat_service.worker import CodecWorker

    started = time.monotonic()
    worker = CodecWorker(settings)
    try:
        worker.load()
    except Exception as error:
        fail(error)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn's own raises the signal again at the end: a service that was asked to stop would have failed
            old = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for s, handler in old.items():
                    signal.signal(s, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                say_ready(settings, time.monotonic() - started)

    config = uvicorn.Config(
        create_app(worker),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    server = Server(config)
    server.run()
    if not server.started:
        raise typer.Exit(1)
    typer.echo("stopped")


def serve_on_ray(settings: Settings) -> None:
    """The app in a Ray Serve replica."""
    from dat_service.replica import RayService, ServeFailed

    started = time.monotonic()
    typer.echo(f"starting {settings.codec} on Ray Serve ...")
    service = RayService(settings)
    try:
        service.start()
        # only now: Ray sets a handler of its own for SIGTERM while it starts
        with stop_signals() as stopped:
            say_ready(settings, time.monotonic() - started, service.prefix)
            stopped.wait()
            typer.echo("stopping ...")
            service.stop()
    except ServeFailed as error:
        fail(error)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    finally:
        service.stop()
    typer.echo("stopped")


def fail(error: Exception) -> NoReturn:
    """One line on stderr, and status 1."""
    typer.echo(f"dat serve: {error}", err=True)
    raise typer.Exit(1) from None


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the second one interrupts."""
    event = threading.Event()

    def note(number: int, _: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
