"""How fast is the service beside its peers, and how much of the codec's own speed do several clients get?

    python -m benchmarks.service --json benchmarks/results/service.json --markdown benchmarks/results/service.md
    python -m benchmarks.service --parts bytes --rounds 9

bytes    `identity`, 128 images of 224 x 224 there and back: dat serve, FastAPI + uvicorn, Ray Serve with its
         default proxy, LitServe, tritonclient, and a raw socket echo as the ceiling
codec    `tiny-f8`, 4 clients with batches of 1, 7, 16 and 40, beside the engine without a service
small    the same with 16 clients and batches of 1
scaling  1, 2, 4, 8 replicas of a stand-in codec that only sleeps, until the cores are full

The contestants of a part take turns in one run (dat_workers/system/timing.py), and ratios compare the same round.
Clients and servers share the machine. LitServe and tritonclient need the extra `bench`; those that are not
installed are left out and reported. Every figure stands beside its target.
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
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"parts to run, by default {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each part, by default 7")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="seconds of each turn in codec and small, by default 20",
    )
    parser.add_argument(
        "--side", type=int, default=224, help="side of the images in bytes, codec and small, by default 224"
    )
    parser.add_argument("--json", type=Path, help="write everything that is measured to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 1 if a part did not run (the reason is on stderr), 130 if it was interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        run(parser().parse_args(words), shlex.join(["python", "-m", "benchmarks.service", *words]))
    except (ValueError, RuntimeError, OSError, StartFailed) as error:
        report(f"benchmarks.service: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        report("benchmarks.service: interrupted; the files hold the parts that were done")
        return 130
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Runs the parts. Raises ValueError for wrong options, and the errors of the parts."""
    parts = [name.strip() for name in options.parts.split(",")]
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"parts is {options.parts!r}, must be of {', '.join(PARTS)}")
    if options.rounds < 1 or options.seconds <= 0 or options.side < 8:
        raise ValueError(
            f"rounds is {options.rounds}, seconds {options.seconds}, side {options.side}: must be at least 1, "
            "more than 0 and at least 8"
        )
    for out in (options.json, options.markdown):
        if out and not out.absolute().parent.is_dir():
            raise ValueError(f"{out}: there is no such folder")
    results: dict[str, Any] = {
        "benchmark": "service",
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "version": __version__,
        "machine": machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "parts": [],
    }
    if "bytes" in parts:
        add(results, echo.run(options.rounds, report, side=options.side), options)
    together = [name for name in ("codec", "small") if name in parts]
    if together:
        for result in throughput.run(together, options.rounds, report, side=options.side, seconds=options.seconds):
            add(results, result, options)
    if "scaling" in parts:
        add(results, scaling.run(options.rounds, report), options)


def add(results: dict[str, Any], part: dict[str, Any], options: argparse.Namespace) -> None:
    """Shows and writes the result of a part at once, so that a run that is cut short loses nothing."""
    results["parts"].append(part)
    print(as_text(table(part)), flush=True)
    if options.json:
        write_atomically(options.json, (json.dumps(results, indent=1) + "\n").encode())
    if options.markdown:
        write_atomically(options.markdown, as_markdown(results).encode())


def report(line: str) -> None:
    """Shows the progress on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
