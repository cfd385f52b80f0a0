"""The flags that every training example has."""

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
    """A parser with the common flags; an example adds its own.

    Two sets of defaults, by the flags' names: `small` on a CPU or without --data, for a run of seconds on the
    photographs inside scikit-image; `full` on a GPU with --data. They are shown by --help.
    """
    told = "\n".join(
        f"defaults {where}: " + ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())
        for where, values in (("on a CPU or without --data", small), ("on a GPU with --data", full))
    )
    parser = argparse.ArgumentParser(
        description=description, epilog=told, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(small=small, full=full)
    service = parser.add_argument_group("service")
    service.add_argument("--url", help="a running service; without it one is started (--local) and stopped")
    service.add_argument("--codec", default="tiny-f8")
    service.add_argument("--timeout-s", type=_positive, default=60.0, metavar="S", help="of a request (60)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", metavar="PATH", help="see above; without it photographs of scikit-image")
    data.add_argument("--classes", type=_count, metavar="N", help="how many labels shards have")
    data.add_argument("--image-size", type=_count, metavar="PIXELS")
    data.add_argument("--workers", type=int, metavar="N", help="processes that read pictures; 0: none")
    attack = parser.add_argument_group("attack")
    attack.add_argument(
        "--preset",
        choices=("paper", "easyrobust"),
        default="easyrobust",
        help="paper: minimise L(x_adv); easyrobust: L(x) + L(x_adv) (the default)",
    )
    attack.add_argument("--alpha", type=float, metavar="A", help="length of the step (the preset's: 0.1)")
    attack.add_argument(
        "--depth",
        type=int,
        default=1,
        metavar="STEPS",
        help="steps between attack and training (1); 0: Algorithm 1",
    )
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_count, metavar="N", help="not for shards, whose length is unknown")
    length.add_argument("--steps", type=_count, metavar="N")
    training.add_argument("--batch-size", type=_count, metavar="N", help="of one process")
    training.add_argument("--lr", type=_positive, metavar="RATE", help="the highest; a cosine to 0 after a warm-up")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    training.add_argument("--amp", nargs="?", const="bf16", choices=tuple(AMP_DTYPES), default="off", help="(bf16)")
    training.add_argument("--seed", type=int, default=0, metavar="N")
    training.add_argument("--out", type=Path, metavar="FILE", help="checkpoint; nothing is written without it")
    training.add_argument("--save-every", type=_count, default=500, metavar="STEPS", help="(500)")
    training.add_argument("--resume", action="store_true", help="go on from --out, if it is there")
    return parser


def resolved(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line with the defaults filled in; `device` is a torch.device, `data` a list or None.

    `rank` and `world` are torchrun's, with `device` the process's own GPU. Exits with status 2 and a usage
    message where flags contradict.
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
        parser.error("--amp fp16 needs a GPU; on a CPU --amp bf16")
    if options.resume and options.out is None:
        parser.error("--resume needs --out, the checkpoint to go on from")
    if options.out is not None and options.out.exists() and not options.resume:
        parser.error(f"{options.out} is there: --resume goes on from it; or name another --out")
    return options


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: no such device {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device: {name} of {torch.cuda.device_count()} CUDA devices")
    return device


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value
