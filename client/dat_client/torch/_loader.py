"""A data loader that adds Q(x) and Q(x + δ) to each batch while the model trains on earlier batches."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dat_client.calls.checks import integer, share
from dat_client.calls.core import Discretized
from dat_client.client import Client
from dat_client.errors import Unavailable, invalid
from dat_client.torch._adversarial import Attack
from dat_client.torch._images import (
    checked_images,
    checked_reconstruction,
    float_dtype,
    from_wire,
    is_empty,
    normal_tensors,
    to_device,
    to_wire,
)
from dat_client.torch._outage import OUTAGE_S, Outages, failed_meanwhile


class AdversarialBatch(NamedTuple):
    """One batch on the trainer's device; images are float [N,3,H,W] in 0..1.

    Attributes:
        images: x.
        reconstruction: Q(x).
        adversarial: Q(x + δ), or Q(x) if the batch was not attacked (see `mix`).
        rest: the remaining elements of the loader's batch, in their order: those after the images, and after Q(x)
            with `precomputed` (labels, targets, a second view).
        position: the number of the batch in this pass over the loader, from 0.
        tokens_changed: the share, 0..1, of the tokens in which Q(x + δ) differs from Q(x). None if the codec has no
            tokens or the batch was not attacked.
        loss: the mean loss, detached, at the point where the gradient was taken; None if there was no attack.
        waited_s: the seconds for which the training loop waited for the codec's answers to this batch.
    """

    images: Tensor
    reconstruction: Tensor
    adversarial: Tensor
    rest: tuple[Any, ...]
    position: int
    tokens_changed: float | None
    loss: Tensor | None
    waited_s: float


class AdversarialLoader:
    """Iterates over `loader` and adds discrete adversarial examples to each batch (DAT, Algorithm 1, lines 2-5).

        loader = AdversarialLoader(data, client, lambda x, y: F.cross_entropy(model(x), y), model=model, depth=1)
        for batch in loader:
            loss = F.cross_entropy(model(batch.adversarial), *batch.rest)

    With `depth=0` this is exactly Algorithm 1: the gradient for a batch is taken at the weights that the batch then
    trains, and the training loop waits for the codec. With `depth=k` the gradient for a batch is taken k training
    steps before the loop receives that batch, so that the codec works while the model trains. The only difference
    from depth 0 is that the gradient then belongs to weights that are k steps old. Each gradient is computed in the
    thread of the training loop, between two training steps, so the weights cannot change while it is computed.

    Q(x) does not depend on the weights, so it is requested as soon as a batch has been read. While the loop trains
    on one batch, `depth + prefetch` batches after it have already been read from `loader`: the gradient has been
    taken for the first `depth` of them, and only Q(x) has been requested for the remaining `prefetch`.

    If a batch fails, the loop first receives all batches before it. The error is then raised in place of the failed
    batch, and the exception's notes give the batch's position. Leaving the loop early cancels the requests that
    have not been sent yet. Every pass over this object is a new pass over `loader`.

    Args:
        loader: yields tuples or lists whose first element is the images: [N,3,H,W], uint8 or float in 0..1 before
            normalisation. A batch of 0 images comes back without an attack. Batches are read in advance, so
            `loader` must not reuse the memory of an earlier batch. With several ranks `loader` must shard the data
            itself (DistributedSampler), under Lightning too.
        client: a Client; the loader has at most `depth + prefetch + 1` calls under way at the same time.
        loss_fn: called with x̂ and with the elements after the images, all on the device; returns the loss to be
            attacked, as for `adversarial`. Enter autocast inside `loss_fn` if the model needs it, because the call
            happens between training steps, outside the autocast of the step.
        model: the module or modules that `loss_fn` calls. The loader cannot find them inside `loss_fn`. It needs
            them to restore their buffers (BatchNorm statistics) after each gradient, and to choose the device.
        depth: the number of training steps from taking a batch's gradient to training on the batch.
        prefetch: the number of batches, beyond the `depth` batches whose gradient has been taken, that are read
            and whose Q(x) is requested.
        precomputed: True if the second element of each batch is Q(x) (`dat precompute`), so that it need not be
            requested.
        mix: the share of the batches, 0..1, that are attacked. They are spread evenly over a pass and have the same
            positions on all ranks. Batches that are not attacked have Q(x) in place of Q(x + δ); with `precomputed`
            nothing is requested for them.
        device: the device of the batches. None stands for the device of the model's first parameter, or for the CPU
            if `model` has no parameters.
        reduction, random_start, generator, gradient_dtype, output_dtype, timeout_s, outage_s, parameters: as for
            `adversarial`.

    Raises InvalidRequest for wrong arguments; iterating raises what `adversarial` and `loader` raise.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        client: Client,
        loss_fn: Callable[..., Any],
        *,
        model: nn.Module | Iterable[nn.Module],
        depth: int = 0,
        prefetch: int = 2,
        precomputed: bool = False,
        mix: float = 1.0,
        device: torch.device | str | None = None,
        reduction: str = "mean",
        random_start: float | None = None,
        generator: torch.Generator | None = None,
        gradient_dtype: str = "FP16",
        output_dtype: str = "UINT8",
        timeout_s: float | None = None,
        outage_s: float = OUTAGE_S,
        **parameters: Any,
    ) -> None:
        self.loader = loader
        self.client = client
        self.loss_fn = loss_fn
        self.depth = integer("depth", depth, 0)
        self.prefetch = integer("prefetch", prefetch, 0)
        self.precomputed = precomputed
        self.mix = share("mix", mix)
        self._device = device
        answer_options = {"output_dtype": output_dtype, "timeout_s": timeout_s}
        self._attack = Attack(
            client, model, reduction, random_start, generator, gradient_dtype, answer_options, parameters, outage_s
        )

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[AdversarialBatch]:
        source = iter(self.loader)
        window: deque[_PendingBatch] = deque()
        position, ended = 0, False
        try:
            while True:
                # The batch whose gradient is taken next needs its Q(x) sooner than the batches after it do. Its
                # requests are therefore sent first; the codec works on them while a slow `loader` is being read.
                for length in (self.depth + 1, self.depth + 1 + self.prefetch):
                    while not ended and len(window) < length:
                        batch = _PendingBatch(position)
                        ended = not self._read(source, batch) or batch.error is not None
                        if not ended or batch.error is not None:
                            window.append(batch)
                        position += 1
                    for batch in itertools.islice(window, self.depth + 1):
                        self._request_adversarial(batch)
                        if batch.error is not None:
                            break
                if not window:
                    return
                yield self._finish(window[0])
                window.popleft()
        finally:
            for batch in window:
                if batch.future is not None:
                    batch.future.cancel()

    def _read(self, source: Iterator[Any], pending: _PendingBatch) -> bool:
        """Reads the loader's next batch into `pending` and requests its Q(x); returns False if there is none."""
        with pending.noting_errors("reading it from the loader"), normal_tensors():
            try:
                batch = next(source)
            except StopIteration:
                return False
            leading = 2 if self.precomputed else 1
            is_sequence = isinstance(batch, tuple | list)
            if not is_sequence or len(batch) < leading:
                leaders = "images, Q(x)" if self.precomputed else "images"
                found = type(batch).__name__ + (f" of {len(batch)}" if is_sequence else "")
                hint = f"let the collate_fn of the loader return ({leaders}, labels, ...)"
                if isinstance(batch, Mapping):
                    keys = ", ".join(f"batch[{key!r}]" for key in batch)
                    hint += f", here made of {keys}"
                raise invalid("loader", f"a tuple or list ({leaders}, ...) for each batch", found=found, hint=hint)
            pending.images, pending.rest = checked_images(batch[0]).detach(), tuple(batch[leading:])
            pending.sent = to_wire(pending.images)
            if self.precomputed:
                pending.reconstruction = checked_reconstruction(batch[1], pending.images)
            elif is_empty(pending.sent):
                pending.reconstruction = pending.sent
            else:
                pending.submit = partial(self.client.submit, pending.sent, **self._attack.answer_options)
                pending.future = pending.submit()
        return True

    def _request_adversarial(self, batch: _PendingBatch) -> None:
        """Takes the gradient for one batch (Algorithm 1, line 3) and sends the request for Q(x + δ) (line 4)."""
        if batch.attacked or batch.error is not None:
            return
        with batch.noting_errors("Q(x) and the gradient there"), normal_tensors():
            device = self.device
            batch.images = from_wire(batch.images, device, float_dtype(batch.images))
            if batch.future is not None:
                batch.reconstruction = batch.answer(self._attack.outages).reconstruction
            batch.reconstruction = from_wire(batch.reconstruction, device, batch.images.dtype)
            batch.rest = _moved(batch.rest, device)
            batch.future, batch.attacked = None, True
            if is_empty(batch.sent) or int((batch.position + 1) * self.mix) == int(batch.position * self.mix):
                return
            if self._attack.generator is None:  # created for the first batch and used in all later passes
                self._attack.generator = torch.Generator(device).manual_seed(torch.initial_seed())
            request, batch.loss = self._attack.request(
                batch.reconstruction, lambda x_hat: self.loss_fn(x_hat, *batch.rest)
            )
            batch.submit = partial(self.client.submit, batch.sent, **request)
            batch.future = batch.submit()

    def _finish(self, batch: _PendingBatch) -> AdversarialBatch:
        """Waits for Q(x + δ) and returns the batch that the loop receives next, or raises the batch's error."""
        with batch.noting_errors("Q(x + δ)"), normal_tensors():
            if batch.error is None:
                adversarial, tokens_changed = batch.reconstruction, None
                if batch.future is not None:
                    answer = batch.answer(self._attack.outages)
                    adversarial = from_wire(answer.adversarial, batch.images.device, batch.images.dtype)
                    tokens_changed = answer.tokens_changed
                return AdversarialBatch(
                    batch.images,
                    batch.reconstruction,
                    adversarial,
                    batch.rest,
                    batch.position,
                    tokens_changed,
                    batch.loss,
                    batch.waited_s,
                )
        assert batch.error is not None
        raise batch.error

    @property
    def device(self) -> torch.device:
        """The device of the batches: the argument `device`, else that of the first parameter, else the CPU."""
        if self._device is not None:
            return torch.device(self._device)
        parameters = (parameter for module in self._attack.modules for parameter in module.parameters())
        first = next(parameters, None)
        return torch.device("cpu") if first is None else first.device


@dataclass(eq=False)
class _PendingBatch:
    """A batch that was read from the loader but that the training loop has not received yet."""

    position: int
    images: Tensor = field(init=False)
    sent: Tensor = field(init=False)
    reconstruction: Any = field(init=False)
    rest: tuple[Any, ...] = field(init=False)
    # Sends the request, also again. It does not refer to this object: in a cycle of references the batch would stay
    # in memory, which may be that of a GPU, until the garbage collector finds it.
    submit: Callable[[], Future[Discretized]] = field(init=False)
    future: Future[Discretized] | None = None  # of Q(x), then of Q(x + δ)
    attacked: bool = False  # True also for a batch that `mix` leaves without an attack
    loss: Tensor | None = None
    error: Exception | None = None
    waited_s: float = 0.0

    def answer(self, outages: Outages) -> Discretized:
        """Waits for the codec's answer and returns it; submits the request again while the service is away."""

        def answer_once() -> Discretized:
            if self.future is None or failed_meanwhile(self.future):
                self.future = self.submit()
            try:
                return outages.result(self.future)
            except Unavailable:
                self.future = None
                raise

        begun = time.perf_counter()
        try:
            return outages.outlast(answer_once)
        finally:
            self.waited_s += time.perf_counter() - begun

    @contextmanager
    def noting_errors(self, activity: str) -> Iterator[None]:
        """Stores an exception of the `with` block in `error` instead of raising it.

        The exception gets a note with the batch's position and `activity`. `_finish` raises it later.
        """
        try:
            yield
        except Exception as error:
            error.add_note(f"AdversarialLoader: batch {self.position}, {activity}")
            self.error = error


def _moved(value: Any, device: torch.device) -> Any:
    """Returns `value` with every tensor moved to the device, also tensors inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return to_device(value, device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value
