"""How fast is the service beside its peers, and what do several clients get of the codec's own speed?

    python -m benchmarks.service --json service.json --markdown service.md
    python -m benchmarks.service --parts bytes --rounds 9

bytes    `identity`, 128 images of 224 x 224 there and back: dat serve, FastAPI + uvicorn, Ray Serve with its
         default proxy, LitServe, tritonclient, and a raw socket echo as the ceiling
codec    `tiny-f8`, 4 clients with batches of 1, 7, 16 and 40, beside the engine without a service
small    the same with 16 clients and batches of 1
scaling  1, 2, 4, 8 replicas of a stand-in codec that only sleeps, and where the cores are full

The contestants of a part take turns in one run (dat_workers/bench/runner.py); ratios are of the same round. Clients
and servers share the machine. LitServe needs the extra `bench`, tritonclient `tritonclient[http]`; what is not
installed is left out and said so. Every figure stands beside the bar it is held to.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.service import echo, scaling, throughput
from benchmarks.service.tables import as_markdown, as_text, table
from dat_service import __version__
from dat_service.launch import StartFailed
from dat_workers.system.files import write_atomically

PARTS = ("bytes", "codec", "small", "scaling")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"[{','.join(PARTS)}]")
    parser.add_argument("--rounds", type=int, default=7, help="of each part [7]")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of a contestant's turn in codec and small [20]"
    )
    parser.add_argument("--side", type=int, default=224, help="of the images in bytes, codec and small [224]")
    parser.add_argument("--json", type=Path, help="write everything measured to FILE")
    parser.add_argument("--markdown", type=Path, help="write the tables to FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 1 where a part did not run (why: stderr), 130 where it was interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        run(parser().parse_args(given), shlex.join(["python", "-m", "benchmarks.service", *given]))
    except (ValueError, RuntimeError, OSError, StartFailed) as error:
        say(f"benchmarks.service: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        say("benchmarks.service: interrupted; the files hold the parts that were done")
        return 130
    return 0


def run(a: argparse.Namespace, command: str) -> None:
    """One run. Raises ValueError for what cannot be asked, and what a part raises."""
    parts = [name.strip() for name in a.parts.split(",")]
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"parts is {a.parts!r}, must be of {', '.join(PARTS)}")
    if a.rounds < 1 or a.seconds <= 0 or a.side < 8:
        raise ValueError(f"rounds {a.rounds}, seconds {a.seconds}, side {a.side}: too small")
    for out in (a.json, a.markdown):
        if out and not out.absolute().parent.is_dir():
            raise ValueError(f"{out}: no such folder")
    results: dict[str, Any] = {
        "benchmark": "service",
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "version": __version__,
        "machine": machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "parts": [],
    }
    if "bytes" in parts:
        add(results, echo.run(a.rounds, say, side=a.side), a)
    together = [name for name in ("codec", "small") if name in parts]
    if together:
        for result in throughput.run(together, a.rounds, say, side=a.side, seconds=a.seconds):
            add(results, result, a)
    if "scaling" in parts:
        add(results, scaling.run(a.rounds, say), a)


def add(results: dict[str, Any], part: dict[str, Any], a: argparse.Namespace) -> None:
    """Keeps a part's result, on the screen and in the files: a run that is cut short keeps what it has."""
    results["parts"].append(part)
    print(as_text(table(part)), flush=True)
    if a.json:
        write_atomically(a.json, (json.dumps(results, indent=1) + "\n").encode())
    if a.markdown:
        write_atomically(a.markdown, as_markdown(results).encode())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
