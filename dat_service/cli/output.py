"""Formats and prints tables, progress and durations, for a terminal or for a log."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dat_client.dataset_format.left_out import LeftOut, Row
from dat_workers.errors import InvalidInput
from dat_workers.system.files import write_atomically
from dat_workers.system.text import duration

if TYPE_CHECKING:
    from rich.table import Table

RATE_OVER_S = 30.0
WIDTH_OF_A_PIPE = 200  # in columns; with its default of 80, rich would cut names off in the input of other programs


def log(line: str) -> None:
    """Prints a line to stderr, so that stdout contains only the result."""
    typer.echo(line, err=True)


def printable(text: str) -> str:
    """Returns a text that stdout can print: bytes of a file's name that are not UTF-8 are shown as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_output_file(option: str, path: Path | None) -> None:
    """Raises InvalidInput if `path` is a folder or lies in a folder that does not exist.

    A command calls this before its work, so that the work is not lost when the result cannot be written.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InvalidInput(option, path, "a file in a folder that exists")


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Writes facts to a JSON file atomically: no reader ever sees a part of the file."""
    write_atomically(path, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())


def print_table(table: Table) -> None:
    """Prints a table to stdout; if stdout is not a terminal, a line may have up to 200 columns."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH_OF_A_PIPE
    Console(width=width, highlight=False, markup=False).print(table)


def print_left_out(rows: Iterable[Row]) -> None:
    """Prints to stderr how many names were left out for each reason, and the first 20 of these names."""
    for line in LeftOut(rows).lines():
        log(line)


@contextmanager
def live_progress(plain_every_s: float) -> Iterator[Callable[[float | None, str], None]]:
    """Yields a function `show(share, text)` that shows the progress of a long job on stderr.

    `share` is the share of the job that is done, from 0 to 1, or None if it is unknown. A terminal shows a bar and
    the text, and rewrites both in place. If stderr is not a terminal, the first text, the last text, and at most
    one text every `plain_every_s` seconds in between are printed, each as a line.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)
            yield lambda share, text: bar.update(
                task, completed=share or 0, total=None if share is None else 1, description=text
            )
        return
    unprinted = ""
    printed_at_s = float("-inf")

    def show(share: float | None, text: str) -> None:
        nonlocal unprinted, printed_at_s
        unprinted = text
        if time.monotonic() - printed_at_s >= plain_every_s:
            printed_at_s = time.monotonic()
            log(text)
            unprinted = ""

    yield show
    if unprinted:
        log(unprinted)


class MovingRate:
    """Measures how fast counters have grown in the last 30 seconds.

    >>> rate = MovingRate()
    >>> rate.per_second(0.0, 0), rate.per_second(10.0, 50)
    ([0.0], [5.0])
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, tuple[float, ...]]] = deque()

    def per_second(self, now_s: float, *counters: float) -> list[float]:
        """Returns the growth per second of each counter, given its present value; 0 at the first call.

        If the clock or the first counter has gone back, the job has begun a new phase, and the measurement starts
        again from these values.
        """
        if self._samples and (now_s < self._samples[-1][0] or counters[0] < self._samples[-1][1][0]):
            self._samples.clear()
        self._samples.append((now_s, counters))
        while len(self._samples) > 2 and now_s - self._samples[0][0] > RATE_OVER_S:
            self._samples.popleft()
        first_s, first = self._samples[0]
        seconds = max(now_s - first_s, 1e-9)
        return [(counter - before) / seconds for counter, before in zip(counters, first, strict=True)]


def time_left(remaining: float, per_second: float) -> str:
    """Returns the time that the remaining amount takes at this rate, as text; `? left` if the rate is 0."""
    return f"{duration(remaining / per_second)} left" if per_second > 0 else "? left"
