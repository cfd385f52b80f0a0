"""The address of a service: the one that runs already, or one that is started for the example."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def service(url: str | None, codec: str, *, local: bool = True, quiet: bool = False) -> Iterator[str]:
    """Yields the address of a running service: `url`, or one that is started here and stopped at the end.

        with service(None, "tiny-f8") as url, Client(url, "tiny-f8") as client:
            ...

    Args:
        local: start it in one process, without Ray.
        quiet: do not print when it is ready; its warnings and errors are shown all the same.

    Exits with a message if the service does not start.
    """
    if url:
        yield url
        return
    try:
        from dat_service.launch import StartFailed, running_service  # a trainer with --url needs dat_client alone
    except ImportError as error:
        sys.exit(f"{error}; pip install dat-service, or name a running service with --url")
    # OpenMP's threads must not spin while they wait: on two busy cores (load 6 to 7), four requests at once (16
    # pictures of 48² each) took 6.4 s with spinning and 2.2 s without, single ones up to 4.2 s and 0.5 s (one run
    # of each).
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    arguments = ["--codec", codec, *(["--local"] if local else [])]
    if not quiet:
        print("starting the service ...", flush=True)
    try:
        with running_service(*arguments, env=environment, stderr=None) as started:
            if not quiet:
                print(started.log, end="", flush=True)
            yield started.url
    except StartFailed as error:
        sys.exit(f"the service did not start: {error}")
