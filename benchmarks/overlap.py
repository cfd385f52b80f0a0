"""How much of the codec's time does `AdversarialLoader(depth=...)` hide behind the training steps?

    python -m benchmarks.overlap --markdown benchmarks/results/overlap.md

The codec is a stand-in that sleeps (benchmarks/stand_ins/sleeping.py), as if it were a remote GPU: first on as many
GPUs as there are requests, each request sleeping for one training step; then on one GPU, where the two requests of
a step (Q(x) and Q(x + δ)) share one step's time. The contestant "no waiting" is the same loop, gradient pass
included, on a codec that does not sleep. Contestants take turns. The trainer has one thread, as a GPU's would.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision.models import resnet18

from benchmarks import machine
from benchmarks.stand_ins.sleeping import name_of, sleeping_service
from benchmarks.tables import machine_line, markdown
from dat_client import Client
from dat_client.torch import AdversarialLoader

FIRST = 4  # batch from which steps are timed: the window is full and the first calls are over
BASELINE = "no waiting"
DEPTHS = (0, 1, 2)
GPUS = 8  # more than the requests that a loader of depth 2 has under way


@dataclass(frozen=True)
class Steps:
    """Seconds for each training step, and the share of them in which the trainer waited."""

    seconds: float
    idle: float


class Loop:
    """A training loop on random images."""

    def __init__(self, batch: int, side: int) -> None:
        torch.manual_seed(0)
        self.data = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8), torch.arange(batch) % 10
        self.model = resnet18(num_classes=10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def run(self, client: Client, depth: int, steps: int) -> Steps:
        """Trains for `steps` steps after the first few, and returns how long they took."""
        loader = AdversarialLoader(
            repeat(self.data),
            client,
            lambda x, y: F.cross_entropy(self.model(x), y),
            model=self.model,
            depth=depth,
        )
        started, idle = 0.0, 0.0
        for batch in loader:
            if batch.position == FIRST:
                started = time.perf_counter()
            elif batch.position > FIRST:
                idle += batch.waited_s
            if batch.position == FIRST + steps:
                break
            self.optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(self.model(batch.adversarial), *batch.rest))
            self.optimizer.step()
        elapsed = time.perf_counter() - started
        return Steps(elapsed / steps, idle / elapsed)


def check_that_it_sleeps(client: Client, images: torch.Tensor, sleep_s: float) -> None:
    """Raises RuntimeError if a call takes less time than the stand-in should sleep: nothing would be measured."""
    started = time.perf_counter()
    client.discretize(images)
    elapsed = time.perf_counter() - started
    if elapsed < sleep_s:
        raise RuntimeError(f"a call took {elapsed:.3f} s, but the stand-in should sleep for {sleep_s:.3f} s")


def measure(options: argparse.Namespace, report: Callable[[str], None]) -> tuple[float, dict[str, list[Steps]]]:
    """Returns the seconds that a request sleeps on one of many GPUs, and every round of each contestant."""
    torch.set_num_threads(1)
    loop = Loop(options.batch, options.side)
    with ExitStack() as stack:

        def connect(sleep_s: float, gpus: int) -> Client:
            ms_per_image = 1000 * sleep_s / options.batch
            url = stack.enter_context(sleeping_service(ms_per_image, gpus=gpus))
            client = stack.enter_context(Client(url, name_of(ms_per_image)))
            check_that_it_sleeps(client, loop.data[0], sleep_s)
            return client

        awake = connect(0, GPUS)
        loop.run(awake, 0, options.steps)
        step_s = statistics.median(loop.run(awake, 0, options.steps).seconds for _ in range(3))
        many, single = connect(step_s, GPUS), connect(step_s / 2, 1)
        contestants = {BASELINE: (awake, 0)}
        contestants |= {f"many GPUs, depth {depth}": (many, depth) for depth in DEPTHS}
        contestants |= {f"one GPU, depth {depth}": (single, depth) for depth in DEPTHS}
        rounds: dict[str, list[Steps]] = {name: [] for name in contestants}
        for number in range(options.rounds):
            for name, (client, depth) in contestants.items():
                rounds[name].append(loop.run(client, depth, options.steps))
                report(f"round {number + 1}, {name}: {rounds[name][-1].seconds:.3f} s a step")
    return step_s, rounds


def table(rounds: dict[str, list[Steps]]) -> str:
    """Returns the medians of the rounds, beside the contestant that does not wait, as Markdown."""
    rows = [["codec (sleeps)", "s a step", "to no waiting (lowest, highest)", "trainer idle"]]
    for name, runs in rounds.items():
        ratios = [run.seconds / base.seconds for run, base in zip(runs, rounds[BASELINE], strict=True)]
        rows.append([
            name,
            f"{statistics.median(run.seconds for run in runs):.3f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})",
            f"{statistics.median(run.idle for run in runs):.0%}",
        ])  # fmt: skip
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images in a batch, by default 16")
    parser.add_argument("--side", type=int, default=64, help="side of the images, by default 64")
    parser.add_argument("--steps", type=int, default=8, help="training steps of one round, by default 8")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, by default 5")
    parser.add_argument("--markdown", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    step_s, rounds = measure(options, lambda line: print(line, file=sys.stderr, flush=True))
    text = (
        f"# python -m benchmarks.overlap\n\n{machine_line(machine.describe(torch.device('cpu')))}; load average "
        f"{before:.1f} before the run. The codec is a stand-in\nthat sleeps. ResNet-18, batch {options.batch} of "
        f"{options.side}², one thread, codec {step_s:.3f} s (one training step, gradient pass included),\n"
        f"{options.rounds} rounds of {options.steps} steps, contestants in turn; ratios are medians of the rounds."
        f"\n\n{table(rounds)}\n"
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
