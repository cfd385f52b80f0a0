"""Trains every example: AdversarialLoader attacks the batches, and each batch is one optimizer step."""

from __future__ import annotations

import math
import signal
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from dat_client import Client
from dat_client.torch import AdversarialBatch, AdversarialLoader

from . import checkpoint
from .data import DataError, batches
from .progress import Progress

WARM_UP = 0.05  # share of the steps during which the learning rate rises


@dataclass(frozen=True)
class Training:
    """The parts of a training, as an example builds them.

    Attributes:
        model: takes pictures [N,3,H,W] in 0..1, and normalises them itself.
        data: its samples are tuples: the picture (uint8 [3,H,W]), then its Q(x) if `precomputed`, then the rest.
        loss: `loss(model, pictures, *rest)`, a mean over the batch, is attacked and then minimised. `rest` is what
            follows the pictures in a batch.
        optimizer: updates the model's parameters.
        collate: turns samples into a batch, if PyTorch's default cannot.
        after_step: is called after each step, for momentum encoders.
        precomputed: says that the data contain Q(x).
        mix: the share of the batches that are attacked; the others are trained on Q(x) instead of Q(x + δ).
    """

    model: nn.Module
    data: Dataset[Any]
    loss: Callable[..., Tensor]
    optimizer: Optimizer
    collate: Callable[..., Any] | None = None
    after_step: Callable[[], None] | None = None
    precomputed: bool = False
    mix: float = 1.0


def train(training: Training, options: Namespace, client: Client) -> Progress:
    """Runs Algorithm 1 over the data: preset `paper` minimises L(x_adv), `easyrobust` L(x) + L(x_adv).

    Writes --out every --save-every steps, at the end, and when an error or a signal ends the training. Raises the
    errors of the client, the data and the checkpoint, and KeyboardInterrupt.
    """
    rank, world, device = options.rank, options.world, options.device
    model = training.model.to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    steps = steps_of(training.data, options)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    parts: dict[str, Any] = {"model": model, "optimizer": training.optimizer, "scaler": scaler}
    start, first = _resumed(options, parts)
    parallel = DistributedDataParallel(model) if world > 1 else model
    torch.manual_seed(options.seed + start * world + rank)  # for augmentations: all processes have the same weights

    def loss_of(network: nn.Module, pictures: Tensor, *rest: Any) -> Tensor:
        with torch.autocast(device.type, options.amp_dtype, enabled=options.amp_dtype is not None):
            return training.loss(network, pictures, *rest)

    def minimise(batch: AdversarialBatch) -> float:
        """Takes one optimizer step; returns the loss before it."""
        pictures = [batch.images, batch.adversarial] if options.preset == "easyrobust" else [batch.adversarial]
        training.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i, x in enumerate(pictures):
            # One backward pass for each forward pass halves the memory, and DistributedDataParallel requires it.
            unsynchronised = world > 1 and i < len(pictures) - 1
            with cast(DistributedDataParallel, parallel).no_sync() if unsynchronised else nullcontext():
                loss = loss_of(parallel, x, *batch.rest)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        scaler.step(training.optimizer)
        scaler.update()
        return total

    def save(step: int) -> None:
        if options.out is not None and rank == 0:
            with signals_deferred():
                states = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save(
                    options.out, {"example": options.example, "step": step, "first": progress.first, **states}
                )

    # The attack uses the bare model: DistributedDataParallel requires a backward pass for each forward pass.
    loader = AdversarialLoader(
        batches(training.data, options, start, steps, collate=training.collate),
        client,
        lambda pictures, *rest: loss_of(model, pictures, *rest),
        model=model,
        depth=options.depth,
        precomputed=training.precomputed,
        mix=training.mix,
        device=device,
        outage_s=options.outage_s,
        preset=options.preset,
        alpha=options.alpha,
    )
    model.train()
    progress = Progress(start, steps, first, shown=rank == 0)
    try:
        with closing(cast(Generator[AdversarialBatch, None, None], iter(loader))) as attacked:
            while progress.step < steps:
                batch = next(attacked)
                with signals_deferred():
                    for group in training.optimizer.param_groups:
                        group["lr"] = options.lr * rate(progress.step, steps)
                    loss = minimise(batch)
                    if training.after_step is not None:
                        training.after_step()
                    beside = "on Q(x)" if batch.loss is None else f"at Q(x) {batch.loss.item():.3f}"
                    images = len(batch.images) * world
                    progress.count(loss, beside, batch.tokens_changed, images, batch.waited_s)
                if progress.step % options.save_every == 0 and progress.step < steps:
                    save(progress.step)
    finally:
        progress.end_line()
        if progress.step > start:
            save(progress.step)
    return progress


def steps_of(data: Dataset[Any], options: Namespace) -> int:
    """Returns --steps, or the steps of --epochs. Raises DataError if the length of an epoch is unknown."""
    if options.steps:
        return int(options.steps)
    if isinstance(data, IterableDataset):
        raise DataError("--data: the number of pictures in shards is unknown: give --steps")
    steps_per_epoch = len(data) // (options.batch_size * options.world)  # type: ignore[arg-type]
    return int(options.epochs * max(1, steps_per_epoch))


def rate(step: int, steps: int) -> float:
    """Returns the learning rate at a step as a share of --lr: a linear rise, then half a cosine down to 0."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM to the end of the block, so that a step or a file that has begun is completed."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def _resumed(options: Namespace, parts: dict[str, Any]) -> tuple[int, list[float]]:
    """Restores the parts from --out if --resume is given; returns the step to begin at and the first losses."""
    if not options.resume or not options.out.exists():
        return 0, []
    state = checkpoint.load(options.out, options.example)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise checkpoint.CheckpointError(
            f"{options.out}: this checkpoint is of another model: {str(error).splitlines()[0]}"
        ) from error
    return state["step"], state["first"]
