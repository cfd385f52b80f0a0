"""Shows the progress of a training: one live line in a terminal, a line every 5 seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque

PLAIN_EVERY_S = 5.0
ENDS = 5  # number of losses averaged at each end of a training


class Progress:
    """Counts steps and prints rates. `first` holds the first losses of the training, also from before a --resume.

    Rates are means since this process began, and so include the cost of starting.
    """

    def __init__(self, step: int, steps: int, first: list[float], *, shown: bool = True) -> None:
        self.start = self.step = step
        self.steps = steps
        self.first = first
        self.last: deque[float] = deque(maxlen=ENDS)
        self.images = 0
        self.waited_s = 0.0
        self.begun = time.monotonic()
        self._shown = shown
        self._live = shown and sys.stdout.isatty()
        self._printed_at = -PLAIN_EVERY_S

    def count(self, loss: float, beside: str, tokens_changed: float | None, images: int, waited_s: float) -> None:
        """Counts one step: its loss, a text to show beside it, its pictures, and its wait for the codec."""
        self.step += 1
        self.images += images
        self.waited_s += waited_s
        if len(self.first) < ENDS:
            self.first.append(loss)
        self.last.append(loss)
        elapsed = self.elapsed_s
        changed = "" if tokens_changed is None else f", tokens changed {tokens_changed:.1%}"
        left = elapsed / (self.step - self.start) * (self.steps - self.step)
        self._print(
            f"step {self.step}/{self.steps}, {clock(left)} left: loss {loss:.3f}, {beside}{changed}, "
            f"{self.images / elapsed:.1f} images/s, waited for the codec {self.waited_s / elapsed:.0%}"
        )

    @property
    def elapsed_s(self) -> float:
        """Seconds since the training began."""
        return max(1e-9, time.monotonic() - self.begun)

    def end_line(self) -> None:
        """Ends the live line, so that later output begins on the next one."""
        if self._live and self.step > self.start:
            print(flush=True)

    def summary(self) -> str:
        """Returns `loss 2.31 -> 0.84 in 40 steps, 21 s`, with means over the first and the last few steps."""
        few = max(1, min(ENDS, self.steps // 2))
        first, last = self.first[:few], list(self.last)[-few:]
        return (
            f"loss {sum(first) / len(first):.2f} -> {sum(last) / len(last):.2f} in {self.step} steps, "
            f"{self.elapsed_s:.0f} s"
        )

    def _print(self, line: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be rewritten
            print(f"\r\x1b[K{line[:width]}", end="", flush=True)
        elif self._shown and (self.elapsed_s - self._printed_at >= PLAIN_EVERY_S or self.step == self.steps):
            self._printed_at = self.elapsed_s
            print(line, flush=True)


def clock(seconds: float) -> str:
    """Formats seconds as 1:02 or 3:04:05.

    >>> clock(62), clock(11045)
    ('1:02', '3:04:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
