"""An example from its flags to its exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import distributed

from dat_client import Client, DatError

from .arguments import resolved
from .checkpoint import CheckpointError
from .data import DataError
from .loop import Training, train
from .service import service

INTERRUPTED = 130  # what a shell gives for Ctrl-C


def run(build: Callable[[Namespace], Training], parser: argparse.ArgumentParser) -> None:
    """Parses the command line, starts what is needed, trains, prints `loss A -> B in N steps, S s`.

    What can go wrong outside of the code (a service that is gone, data that cannot be read, a GPU that is full)
    ends it with one line on stderr and status 1, Ctrl-C and SIGTERM with status 130; a checkpoint (--out) is
    written first. Under torchrun each process trains on its share of the data (DistributedDataParallel).
    """
    options = resolved(parser)
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    if options.device.type == "cpu" and not options.url and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the service computes on the same cores
    try:
        with processes(options):
            torch.manual_seed(options.seed)
            training = build(options)
            with the_service(options) as url:
                # AdversarialLoader has depth + 3 requests under way at most (its `prefetch` is 2).
                connections = max(8, options.depth + 3)
                with Client(url, options.codec, timeout_s=options.timeout_s, max_connections=connections) as client:
                    progress = train(training, options, client)
    except KeyboardInterrupt:
        print(f"{options.example}: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{options.example}: {one_line(error)} A smaller --batch-size or --image-size may fit.")
    except (DatError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"{options.example}: {one_line(error)}")
    if options.rank == 0:
        print(progress.summary() if progress.last else f"{options.out}: trained already, {progress.step} steps")


def one_line(error: BaseException) -> str:
    """What an error says, with its notes, in one line.

    An error in one of DataLoader's processes arrives with that process's traceback for a message: its last line.
    """
    text = str(error)
    said = text.strip().splitlines()[-1] if "Traceback" in text else " ".join(text.split())
    return " | ".join([said or type(error).__name__, *getattr(error, "__notes__", [])])


@contextmanager
def processes(options: Namespace) -> Iterator[None]:
    """Under torchrun, the process group."""
    if options.world == 1:
        yield
        return
    cuda = options.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(options.device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def the_service(options: Namespace) -> Iterator[str]:
    """The service for all processes: --url, or one that the first process starts on its machine."""
    if options.url or options.world == 1:
        with service(options.url, options.codec, quiet=True) as url:
            yield url
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != options.world:
        raise DataError("several machines need --url, a service that all of them reach")
    told: list[str | None] = [None]
    if options.rank == 0:
        with service(None, options.codec, quiet=True) as url:
            told[0] = url
            distributed.broadcast_object_list(told)
            yield url
            distributed.barrier()  # the others may still be asking
        return
    distributed.broadcast_object_list(told)
    yield str(told[0])
    distributed.barrier()


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt
