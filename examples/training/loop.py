"""The training loop of every example: AdversarialLoader around the data, one optimizer step a batch."""

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

WARM_UP = 0.05  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class Training:
    """What one example is made of.

    Attributes:
        model: takes pictures [N,3,H,W] in 0..1 and normalises them itself.
        data: a sample is a tuple, the picture first (uint8 [3,H,W]), its Q(x) second where `precomputed`.
        loss: `loss(model, pictures, *rest)`, the mean over the batch: what is attacked, and then minimised. `rest`
            is what follows the pictures in a batch.
        optimizer: over the model's parameters.
        collate: samples to a batch, where the default cannot.
        after_step: called after each step, for momentum encoders.
        precomputed: the data hold Q(x).
        mix: the share of the batches that are attacked; the others are trained on Q(x) in the place of Q(x + δ).
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
    """Algorithm 1 over the data: preset `paper` minimises L(x_adv), `easyrobust` L(x) + L(x_adv).

    Writes --out every --save-every steps, at the end, and when something stops it between steps. Raises what the
    client, the data and the checkpoint raise, and KeyboardInterrupt.
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
    torch.manual_seed(options.seed + start * world + rank)  # augmentations; the weights are all the same by now

    def loss_of(network: nn.Module, pictures: Tensor, *rest: Any) -> Tensor:
        with torch.autocast(device.type, options.amp_dtype, enabled=options.amp_dtype is not None):
            return training.loss(network, pictures, *rest)

    def minimise(batch: AdversarialBatch) -> float:
        """One optimizer step; the loss before it."""
        pictures = [batch.images, batch.adversarial] if options.preset == "easyrobust" else [batch.adversarial]
        training.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i, x in enumerate(pictures):
            # A backward pass for each: half the memory, and DistributedDataParallel wants one for each forward.
            alone = world > 1 and i < len(pictures) - 1
            with cast(DistributedDataParallel, parallel).no_sync() if alone else nullcontext():
                loss = loss_of(parallel, x, *batch.rest)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        scaler.step(training.optimizer)
        scaler.update()
        return total

    def save(step: int) -> None:
        if options.out is not None and rank == 0:
            with whole():
                states = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save(
                    options.out, {"example": options.example, "step": step, "first": progress.first, **states}
                )

    # The attack works on the model itself: DistributedDataParallel wants a backward pass for each forward pass.
    loader = AdversarialLoader(
        batches(training.data, options, start, steps, collate=training.collate),
        client,
        lambda pictures, *rest: loss_of(model, pictures, *rest),
        model=model,
        depth=options.depth,
        precomputed=training.precomputed,
        mix=training.mix,
        device=device,
        preset=options.preset,
        alpha=options.alpha,
    )
    model.train()
    progress = Progress(start, steps, first, shown=rank == 0)
    try:
        with closing(cast(Generator[AdversarialBatch, None, None], iter(loader))) as turns:
            while progress.step < steps:
                batch = next(turns)
                with whole():
                    for group in training.optimizer.param_groups:
                        group["lr"] = options.lr * rate(progress.step, steps)
                    loss = minimise(batch)
                    if training.after_step is not None:
                        training.after_step()
                    seen = (len(batch.images) * world, batch.waited_s)
                    beside = "on Q(x)" if batch.loss is None else f"at Q(x) {batch.loss.item():.3f}"
                    progress.count(loss, beside, batch.tokens_changed, *seen)
                if progress.step % options.save_every == 0 and progress.step < steps:
                    save(progress.step)
    finally:
        progress.end_line()
        if progress.step > start:
            save(progress.step)
    return progress


def steps_of(data: Dataset[Any], options: Namespace) -> int:
    """--steps, or the steps of --epochs. Raises DataError where the data do not say how long an epoch is."""
    if options.steps:
        return int(options.steps)
    if isinstance(data, IterableDataset):
        raise DataError("--data: how many pictures shards hold is not known: give --steps")
    an_epoch = len(data) // (options.batch_size * options.world)  # type: ignore[arg-type]
    return int(options.epochs * max(1, an_epoch))


def rate(step: int, steps: int) -> float:
    """The share of --lr at a step: a linear rise, then half a cosine down."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@contextmanager
def whole() -> Iterator[None]:
    """A Ctrl-C or SIGTERM inside comes at the end: a step that has begun is made, a file that has begun written."""
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _resumed(options: Namespace, parts: dict[str, Any]) -> tuple[int, list[float]]:
    """The step to begin at and the first losses, with the parts' states taken from --out where --resume says so."""
    if not options.resume or not options.out.exists():
        return 0, []
    state = checkpoint.load(options.out, options.example)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise checkpoint.CheckpointError(
            f"{options.out}: of another model: {str(error).splitlines()[0]}"
        ) from error
    return state["step"], state["first"]
