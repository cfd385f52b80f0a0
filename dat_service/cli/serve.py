"""`dat serve`."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dat_service.settings import Settings, SettingsError, make_settings

if TYPE_CHECKING:
    from dat_service.ray.service import RayService


def serve(
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Codec to serve (`dat codecs list`); several: each at /NAME. [default: tiny-f8]"),
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
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine. [default: all cores, shared by the replicas]")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one API key a line. [default: no key is asked for]")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas of each codec. [default: 1]")] = None,
    autoscale: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="As many replicas as the images that wait ask for.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs of a replica; 0.5: two share one. [default: 1, where there is one]")
    ] = None,
    max_wait_ms: Annotated[
        float | None, typer.Option(help="How long a batch waits to be filled. [default: 2 on CUDA, 0 on CPU]")
    ] = None,
    max_queue_s: Annotated[
        float | None, typer.Option(help="Longest expected wait; more gets 503. [default: 10]")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Requests a replica holds; more get 503. [default: 256]")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. [default: text]")] = None,
    serve_config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write what `serve deploy` takes for all this (-: print it), and leave."),
    ] = None,
) -> None:
    """Serve codecs over HTTP until Ctrl-C; SIGHUP loads them anew.

    Every option, and every limit in dat_service/settings.py, is also a variable: DAT_PORT, DAT_MAX_IMAGES, ...
    """
    # before torch is loaded: its threads would spin while they wait, and take the cores from who has work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # before ray is: its functions would start a Ray with default options wherever there is none, after the end too
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    flags: dict[str, Any] = {
        "port": port, "host": host, "engine": engine, "device": device, "dtype": dtype, "tricks": tricks,
        "threads": threads, "api_key_file": api_key_file, "replicas": replicas, "autoscale": autoscale,
        "gpus": gpus, "max_wait_ms": max_wait_ms, "max_queue_s": max_queue_s, "max_requests": max_requests,
        "log_format": log_format,
    }  # fmt: skip
    try:
        settings = [make_settings(**flags, codec=name) for name in codec or [None]]  # type: ignore[list-item]
        if serve_config is not None:
            write_serve_config(settings, serve_config)
            return
        check_startable(settings, local=local)
    except (SettingsError, ValueError, OSError) as error:
        fail(error)
    if local:
        serve_local(settings[0])
    else:
        serve_on_ray(settings)


def write_serve_config(settings: list[Settings], path: str) -> None:
    """Serve's YAML into a file, or on stdout for "-"."""
    import yaml

    from dat_service.ray.deployments import serve_config

    text = yaml.safe_dump(serve_config(settings), sort_keys=False)
    if path == "-":
        typer.echo(text, nl=False)
    else:
        Path(path).write_text(text)


def check_startable(all_settings: list[Settings], *, local: bool) -> None:
    """Raises what would only show later, and slowly: an unknown codec or trick, a taken port, bad keys, ..."""
    from dat_service.http.auth import read_keys
    from dat_service.observability import tracing
    from dat_workers.codecs.store import CodecStore

    settings = all_settings[0]
    if local and (
        len(all_settings) > 1 or settings.replicas > 1 or settings.autoscale is not None or settings.gpus
    ):
        raise SettingsError("--local is one process with one codec: no replicas, autoscale or gpus")
    if not local:
        from dat_service.ray.deployments import check

        check(all_settings)
    _ = settings.engine_config  # raises ValueError for unusable engine settings
    for each in all_settings:
        CodecStore().load(each.codec)
    read_keys(settings.api_key_file)
    tracing.wanted()
    if os.environ.get("RAY_ADDRESS") and not local:
        return  # Serve listens on the cluster's nodes, and may do so already
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((settings.host, settings.port))
        except (OSError, TypeError) as error:  # TypeError: a host name that is no text
            raise OSError(f"cannot listen on {settings.host!r}, port {settings.port}: {error}") from None


def say_ready(urls: dict[str, str], seconds: float) -> None:
    """The line that scripts and people wait for."""
    places = ", ".join(f"{codec} at {url}" for codec, url in urls.items())
    try_it = next(iter(urls.values()))
    typer.echo(f"ready after {seconds:.1f} s: {places}, try it at {try_it}/, Ctrl-C ends it")


def serve_local(settings: Settings) -> None:
    """The app under uvicorn in this process."""
    import uvicorn

    from dat_service.http.app import create_app
    from dat_service.http.header_limits import LimitedHeaders
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
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                say_ready({settings.codec: f"http://{host}:{settings.port}"}, time.monotonic() - started)

    config = uvicorn.Config(
        create_app(worker),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=LimitedHeaders,
        proxy_headers=False,  # no proxy is before it: X-Forwarded-For would be the client's own word
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    server = Server(config)
    server.run()
    if not server.started:
        raise typer.Exit(1)
    typer.echo("stopped")


def serve_on_ray(settings: list[Settings]) -> None:
    """The app in Ray Serve replicas."""
    from dat_service.ray.service import RayService, ServeFailed

    started = time.monotonic()
    try:
        service = RayService(*settings)
    except SettingsError as error:
        fail(error)
    typer.echo(f"starting {', '.join(s.codec for s in settings)} on Ray Serve ...")
    try:
        with no_updates():
            service.start()
        # only now: Ray sets a handler of its own for SIGTERM while it starts
        with signals() as asked:
            say_ready(service.urls, time.monotonic() - started)
            wanted = threading.Event()
            threading.Thread(target=updates, args=[service, wanted], daemon=True).start()
            while asked.get() == "update":
                wanted.set()
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


def updates(service: RayService, wanted: threading.Event) -> None:
    """Updates one after the other, for ever; those that are wanted during one are one more."""
    while wanted.wait():
        wanted.clear()
        update(service)


def update(service: RayService) -> None:
    """What SIGHUP asks for. The old replicas go on where the new ones do not start."""
    from dat_service.ray.service import ServeFailed

    started = time.monotonic()
    typer.echo("updating ...")
    try:
        service.update()
    except ServeFailed as error:
        typer.echo(f"dat serve: not updated: {error}", err=True)
    else:
        typer.echo(f"updated after {time.monotonic() - started:.1f} s")


def fail(error: Exception) -> NoReturn:
    """One line on stderr, and status 1."""
    typer.echo(f"dat serve: {error}", err=True)
    raise typer.Exit(1) from None


@contextlib.contextmanager
def signals() -> Iterator[queue.SimpleQueue[str]]:
    """What signals ask for: "stop" (SIGINT, SIGTERM) and "update" (SIGHUP). A second "stop" interrupts."""
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()  # the one queue that a signal handler may put into
    stopping = False
    had_terminal = has_terminal()

    def note(number: int, _: object) -> None:
        nonlocal stopping
        if number == signal.SIGHUP and (has_terminal() or not had_terminal):
            asked.put("update")
        elif stopping:
            raise KeyboardInterrupt
        else:  # or the terminal was closed, which is also told by SIGHUP
            stopping = True
            asked.put("stop")

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def no_updates() -> Iterator[None]:
    """SIGHUP asks for nothing while the service starts, unless it says that the terminal was closed."""
    had_terminal = has_terminal()

    def note(_: int, __: object) -> None:
        if had_terminal and not has_terminal():
            raise KeyboardInterrupt

    old = signal.signal(signal.SIGHUP, note)  # a function, for Ray's processes would keep SIG_IGN
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, old)


def has_terminal() -> bool:
    """Whether this process belongs to a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True
