"""`dat codecs`: which codecs there are, and how they get onto this machine."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Codecs: list, show, pull, import and verify.", no_args_is_help=True, pretty_exceptions_show_locals=False
)

PLAIN_EVERY_S = 5.0  # how often a line of progress is written where there is no terminal


@contextmanager
def told(interrupted: str = "interrupted") -> Iterator[None]:
    """CodecError becomes one line on stderr and exit status 1, Ctrl-C a line and 130."""
    from dat_workers.codecs.spec import CodecError

    try:
        yield
    except (CodecError, OSError) as error:
        typer.echo(f"dat: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(f"dat: {interrupted}", err=True)
        raise typer.Exit(130) from error


@app.command("list")
def list_codecs() -> None:
    """All codecs of the registry, and those installed beside it."""
    from rich.console import Console
    from rich.table import Table

    from dat_workers.codecs import file
    from dat_workers.codecs.registry import REGISTRY
    from dat_workers.codecs.spec import CodecError
    from dat_workers.codecs.store import CodecStore

    with told():
        store = CodecStore()
        table = Table("name", "f", "K", "d", "parameters", "status", box=None)
        for name in store.names():
            status = store.status(name)
            spec = REGISTRY.get(name)
            if spec is None:
                try:
                    spec = file.read_header(store.path(name)).spec
                except CodecError:
                    table.add_row(name, "", "", "", "", status)
                    continue
            size = f"{file.parameter_count(spec) / 1e6:.1f} M" if spec.has_tokens else "–"
            k, d = (str(spec.codebook_size), str(spec.latent_dim)) if spec.has_tokens else ("–", "–")
            table.add_row(name, str(spec.factor), k, d, size, status)
        # whole lines where the output is read by a program: rich would cut names at 80 columns
        Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The codec's name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Everything known of one codec; an installed one is read and verified."""
    from dat_workers.codecs import file
    from dat_workers.codecs.registry import REGISTRY
    from dat_workers.codecs.store import CodecStore

    with told():
        store = CodecStore()
        status = store.status(name)
        codec = None
        if name not in REGISTRY or status in ("embedded", "installed"):
            codec = store.load(name)
        spec = codec.spec if codec else REGISTRY[name]
        facts: dict[str, Any] = {
            **spec.to_dict(),
            "factor": spec.factor,
            "parameters": file.parameter_count(spec),
            "status": status,
            "path": None if name == "identity" else str(store.path(name)),
            "fingerprint": codec.fingerprint if codec else None,
            "origin": asdict(codec.origin) if codec else None,
        }
        if as_json:
            typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
            return
        for key, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            typer.echo(f"{key:17}{'–' if value in (None, '') else value}")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A codec of the registry.")],
    url: Annotated[str | None, typer.Option(help="Download from here instead.")] = None,
) -> None:
    """Download a published codec, check it and install it; an interrupted download is resumed."""
    from dat_workers.codecs import download
    from dat_workers.codecs.store import CodecStore

    with told("interrupted; the same command resumes the download"):
        store = CodecStore()
        with _progress(name) as progress:
            mark = download.pull(name, store, progress, url)
        typer.echo(f"installed {name}\nfingerprint {mark}\npath {store.path(name)}")


@app.command("import")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help=".ckpt, .zip, .pt or .safetensors.")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="The codec's name.")],
    force: Annotated[bool, typer.Option(help="Replace an installed codec of that name.")] = False,
) -> None:
    """Install a codec from a checkpoint at hand; for a new name the geometry is read from the weights."""
    from dat_workers.codecs.checkpoint import infer_spec, read_checkpoint
    from dat_workers.codecs.file import Origin, check_weights
    from dat_workers.codecs.registry import REGISTRY
    from dat_workers.codecs.store import CodecStore

    with told():
        store = CodecStore()
        store.path(name)  # an unsafe name is refused before a gigabyte is read
        known = REGISTRY.get(name)
        loaded = read_checkpoint(checkpoint, known.source_member if known else None)
        spec = known or infer_spec(loaded.tensors, name)
        check_weights(spec, loaded.tensors, str(checkpoint))
        with checkpoint.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        mark = store.add(spec, loaded.tensors, Origin.now(checkpoint.name, digest), replace=force)
        typer.echo(f"dropped: {', '.join(loaded.dropped) or 'nothing'}")
        typer.echo(f"installed {name}\nfingerprint {mark}\npath {store.path(name)}")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, else a line every few seconds; both with rate and time left, on stderr."""
    if not sys.stderr.isatty():
        yield _plain_progress(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)

        def update(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def _plain_progress(name: str) -> Callable[[int, int | None], None]:
    started: tuple[float, int] | None = None
    last = float("-inf")

    def update(done: int, total: int | None) -> None:
        nonlocal started, last
        now = time.monotonic()
        if started is None or done < started[1]:
            started = (now, done)
        if now - last < PLAIN_EVERY_S and done != total:
            return
        last = now
        rate = (done - started[1]) / max(now - started[0], 1e-3)
        left = f", {(total - done) / rate:.0f} s left" if total is not None and rate > 0 else ""
        size = f" of {total / 1e6:.1f}" if total is not None else ""
        typer.echo(f"{name}: {done / 1e6:.1f}{size} MB, {rate / 1e6:.1f} MB/s{left}", err=True)

    return update
