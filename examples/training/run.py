"""Runs an example, from its flags to its exit status."""

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

INTERRUPTED = 130  # the status that a shell reports after Ctrl-C


def run(build: Callable[[Namespace], Training], parser: argparse.ArgumentParser) -> None:
    """Parses the command line, starts a service if none is named, trains, and prints `loss A -> B in N steps, S s`.

    Failures outside of the code, such as a lost service, unreadable data or a full GPU, end it with one line on
    stderr and status 1; Ctrl-C and SIGTERM end it with status 130. The checkpoint --out is written first. Under
    torchrun, each process trains on its share of the data (DistributedDataParallel).
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
                # AdversarialLoader has at most depth + 3 requests in flight (its `prefetch` is 2).
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
        print(progress.summary() if progress.last else f"{options.out}: already trained, {progress.step} steps")


def one_line(error: BaseException) -> str:
    """Returns the message of an error with its notes, in one line.

    The message of an error in one of DataLoader's processes is that process's traceback, of which the last line
    counts.
    """
    text = str(error)
    message = text.strip().splitlines()[-1] if "Traceback" in text else " ".join(text.split())
    return " | ".join([message or type(error).__name__, *getattr(error, "__notes__", [])])


@contextmanager
def processes(options: Namespace) -> Iterator[None]:
    """Forms the process group under torchrun."""
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
    """Yields the service of all processes: --url, or one that the first process starts on its machine."""
    if options.url or options.world == 1:
        with service(options.url, options.codec, quiet=True) as url:
            yield url
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != options.world:
        raise DataError("several machines need --url, the address of a service that all of them reach")
    shared_url: list[str | None] = [None]
    if options.rank == 0:
        with service(None, options.codec, quiet=True) as url:
            shared_url[0] = url
            distributed.broadcast_object_list(shared_url)
            yield url
            distributed.barrier()  # other processes may still send requests
        return
    distributed.broadcast_object_list(shared_url)
    yield str(shared_url[0])
    distributed.barrier()


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt
