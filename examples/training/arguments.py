"""Parses the flags that every training example has."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def example_parser(
    description: str | None, *, small: Mapping[str, Any], full: Mapping[str, Any]
) -> argparse.ArgumentParser:
    """Returns a parser with the common flags, to which an example adds its own.

    There are two sets of defaults, by the names of the flags: `small` applies on a CPU or without --data, for a run
    of seconds on the photographs inside scikit-image; `full` applies on a GPU with --data. --help shows both.
    """
    defaults = "\n".join(
        f"defaults {where}: " + ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())
        for where, values in (("on a CPU or without --data", small), ("on a GPU with --data", full))
    )
    parser = argparse.ArgumentParser(
        description=description, epilog=defaults, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(small=small, full=full)
    service = parser.add_argument_group("service")
    service.add_argument("--url", help="address of a running service (default: one is started with --local)")
    service.add_argument("--codec", default="tiny-f8", help="codec of the service (default tiny-f8)")
    service.add_argument(
        "--timeout-s", type=_positive, default=60.0, metavar="S", help="limit of a request in seconds (default 60)"
    )
    service.add_argument(
        "--outage-s",
        type=_not_negative,
        default=1800.0,
        metavar="S",
        help="how long to wait for a service that is away, in seconds (default 1800)",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", metavar="PATH", help="see above (default: photographs of scikit-image)")
    data.add_argument("--classes", type=_count, metavar="N", help="number of labels in shards")
    data.add_argument("--image-size", type=_count, metavar="PIXELS", help="side of the pictures")
    data.add_argument("--workers", type=int, metavar="N", help="processes that read pictures; 0 for none")
    attack = parser.add_argument_group("attack")
    attack.add_argument(
        "--preset",
        choices=("paper", "easyrobust"),
        default="easyrobust",
        help="paper minimises L(x_adv), easyrobust L(x) + L(x_adv) (default easyrobust)",
    )
    attack.add_argument("--alpha", type=float, metavar="A", help="length of the attack's step (default 0.1)")
    attack.add_argument(
        "--depth",
        type=int,
        default=1,
        metavar="STEPS",
        help="steps between attack and training (default 1); 0 is Algorithm 1",
    )
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_count, metavar="N", help="passes over the data; not for shards")
    length.add_argument("--steps", type=_count, metavar="N", help="optimizer steps")
    training.add_argument("--batch-size", type=_count, metavar="N", help="pictures in a batch of one process")
    training.add_argument(
        "--lr", type=_positive, metavar="RATE", help="highest learning rate; it falls by a cosine"
    )
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    training.add_argument(
        "--amp",
        nargs="?",
        const="bf16",
        choices=tuple(AMP_DTYPES),
        default="off",
        help="mixed precision (off)",
    )
    training.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and data (default 0)")
    training.add_argument("--out", type=Path, metavar="FILE", help="checkpoint to write (default: none)")
    training.add_argument(
        "--save-every", type=_count, default=500, metavar="STEPS", help="steps between checkpoints (default 500)"
    )
    training.add_argument("--resume", action="store_true", help="continue from the checkpoint --out, if it exists")
    return parser


def resolved(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line with the defaults filled in; `device` is a torch.device, `data` a list or None.

    `rank` and `world` are those of torchrun, and `device` is then the process's own GPU. Exits with status 2 and a
    usage message if flags contradict each other.
    """
    options = parser.parse_args(arguments)
    options.example = Path(parser.prog).stem
    options.device = _device(parser, options.device)
    defaults = dict(options.full if options.data and options.device.type == "cuda" else options.small)
    if options.steps or options.epochs:
        defaults |= {"steps": None, "epochs": None}
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    if options.workers is None:
        options.workers = min(8, os.cpu_count() or 1) if options.device.type == "cuda" and options.data else 0
    options.world = int(os.environ.get("WORLD_SIZE", "1"))
    options.rank = int(os.environ.get("RANK", "0"))
    options.amp_dtype = AMP_DTYPES[options.amp]
    if options.amp == "fp16" and options.device.type == "cpu":
        parser.error("--amp fp16 needs a GPU; use --amp bf16 on a CPU")
    if options.resume and options.out is None:
        parser.error("--resume needs --out, the checkpoint to continue from")
    if options.out is not None and options.out.exists() and not options.resume:
        parser.error(f"{options.out} exists: continue from it with --resume, or name another --out")
    return options


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: {name!r} is not a device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device: {name} does not exist, there are {torch.cuda.device_count()} CUDA devices")
    return device


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value
