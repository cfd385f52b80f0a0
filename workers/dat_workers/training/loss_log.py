"""Keeps the losses of a training run: OUT/log.jsonl, and OUT/loss.svg, which is drawn from it."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dat_workers.system.files import write_atomically
from dat_workers.training.loss_curve import loss_curve

TERMS = ("mse", "perceptual", "commitment", "discriminator")


class LossLog:
    """The losses of a training run, over all of its interruptions.

    A run continues from its checkpoint, which may be older than the end of the log. The entries after `step`, the
    step of the checkpoint, are computed again: they are dropped, as is a line that a killed run left unfinished.
    `dropped` is the number of these lines. The file is left as it is until the first new entry.
    """

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.path, self.curve = folder / "log.jsonl", folder / "loss.svg"
        self.steps = steps
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.splitlines()
        read = [_entry(line) for line in lines]
        self.entries = [entry for entry in read if entry is not None and entry["step"] <= step]
        self.dropped = len(lines) - len(self.entries)
        self._rewrite = self.dropped > 0 or not content.endswith(b"\n")
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()

    @property
    def pending(self) -> bool:
        """Whether steps were added since the last entry."""
        return bool(self._counts)

    def add(self, terms: Mapping[str, float]) -> None:
        """Adds the terms of one step; the next entry has the mean of each term over the steps that had it."""
        for name, value in terms.items():
            self._sums[name] += value
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """Returns the mean of each term over the steps since the last entry, and the PSNR of the crops in dB."""
        means = {name: self._sums[name] / count for name, count in self._counts.items()}
        return means | {"crop_psnr_db": 10 * math.log10(4 / max(means["mse"], 1e-10))}

    def write(self, step: int, seconds: float, facts: Mapping[str, float]) -> None:
        """Writes an entry with the means of the terms, and draws the curve again. Raises OSError."""
        entry = {"step": step, "seconds": round(seconds)} | self.means() | dict(facts)
        self.entries.append(entry)
        self._sums.clear()
        self._counts.clear()
        if self._rewrite:
            text = "".join(json.dumps(each) + "\n" for each in self.entries)
            write_atomically(self.path, text.encode())
            self._rewrite = False
        else:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        self.draw()

    def draw(self) -> None:
        """Writes OUT/loss.svg."""
        lines = {term: [(e["step"], e[term]) for e in self.entries if term in e] for term in TERMS}
        write_atomically(self.curve, loss_curve(lines, self.steps).encode())


def _entry(line: bytes) -> dict[str, Any] | None:
    """Returns the entry of a line of the log, or None if the line is not whole."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
