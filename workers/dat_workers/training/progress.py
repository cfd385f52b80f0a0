"""Describes what a training run is doing at the moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

TRAINING = "training"
REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class TrainProgress:
    """The activity of a training run, and how much of it is done.

    `activity` is what is being done, for example "reading pictures"; `done` and `total` (None: unknown) are counted
    in `unit`. While the activity is TRAINING, the unit is steps and `terms` are the terms of the loss.
    """

    activity: str
    done: int
    total: int | None
    unit: str
    terms: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[TrainProgress], None]


def no_report(progress: TrainProgress) -> None:
    """Ignores the progress."""


def throttled(report: Report, every_s: float = REPORT_EVERY_S) -> Report:
    """Returns a function that passes progress on to `report` at most once every `every_s` seconds.

    The first and the last progress of an activity are always passed on.
    """
    activity = ""
    passed_on_at_s = float("-inf")

    def pass_on(progress: TrainProgress) -> None:
        nonlocal activity, passed_on_at_s
        now_s = time.monotonic()
        ends = progress.activity != activity or progress.done == progress.total
        if ends or now_s - passed_on_at_s >= every_s:
            activity, passed_on_at_s = progress.activity, now_s
            report(progress)

    return pass_on
