"""How much of the codec's time does `AdversarialLoader(depth=...)` hide behind the training steps?

    python benchmarks/overlap.py

The codec is a stand-in that sleeps (benchmarks/sleeping_codec.py), as if it were a remote GPU: first on as many
GPUs as there are requests, each request sleeping for one training step; then on one GPU, where the two requests
of a step (Q(x), Q(x + δ)) share one step's time. The contestant that does not wait is the same loop, gradient
pass and all, on a codec that does not sleep. Contestants alternate. The trainer has one thread, as a GPU's would.
Results: benchmarks/results/overlap.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from itertools import repeat

import torch
from torch.nn import functional as F
from torchvision.models import resnet18

from benchmarks.sleeping_codec import sleeping_codec
from dat_client import Client
from dat_client.torch import AdversarialLoader

FIRST = 4  # batch from which it is timed: the window is full and the first calls are made


class Loop:
    """A training loop on random pictures; `run` gives its seconds a step and the share for which it idled."""

    def __init__(self, batch: int, side: int) -> None:
        torch.manual_seed(0)
        self.data = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8), torch.arange(batch) % 10
        self.model = resnet18(num_classes=10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def run(self, client: Client, depth: int, steps: int) -> tuple[float, float]:
        loader = AdversarialLoader(
            repeat(self.data),
            client,
            lambda x, y: F.cross_entropy(self.model(x), y),
            model=self.model,
            depth=depth,
        )
        begun, idle = 0.0, 0.0
        for batch in loader:
            if batch.position == FIRST:
                begun = time.perf_counter()
            elif batch.position > FIRST:
                idle += batch.waited_s
            if batch.position == FIRST + steps:  # so many turns of the loader, so many steps, and none of the end
                break
            self.optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(self.model(batch.adversarial), *batch.rest))
            self.optimizer.step()
        took = time.perf_counter() - begun
        return took / steps, idle / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="training steps of one round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loop = Loop(arguments.batch, arguments.side)
    with ExitStack() as stack:

        def connect(sleep_s: float, workers: int) -> Client:
            return stack.enter_context(Client(stack.enter_context(sleeping_codec(sleep_s, workers)), "identity"))

        awake = connect(0, 8)
        loop.run(awake, 0, arguments.steps)
        step_s = statistics.median(loop.run(awake, 0, arguments.steps)[0] for _ in range(3))
        many, one = connect(step_s, 8), connect(step_s / 2, 1)
        contestants = {"no waiting": (awake, 0)}
        contestants |= {f"many GPUs, depth {depth}": (many, depth) for depth in (0, 1, 2)}
        contestants |= {f"one GPU, depth {depth}": (one, depth) for depth in (0, 1, 2)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for number in range(arguments.rounds):
            for name, (client, depth) in contestants.items():
                found[name].append(loop.run(client, depth, arguments.steps))
                print(f"round {number + 1}, {name}: {found[name][-1][0]:.3f} s a step", flush=True)
    print(
        f"\nbatch {arguments.batch} of {arguments.side}², {torch.get_num_threads()} threads, codec {step_s:.3f} s"
    )
    print("| codec (sleeps) | s a step | to no waiting (lowest, highest) | trainer idle |\n|---|---|---|---|")
    for name, runs in found.items():
        ratios = [run[0] / base[0] for run, base in zip(runs, found["no waiting"], strict=True)]
        print(
            f"| {name} | {statistics.median(run[0] for run in runs):.3f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}, {max(ratios):.2f}) | {statistics.median(run[1] for run in runs):.0%} |"
        )


if __name__ == "__main__":
    main()
