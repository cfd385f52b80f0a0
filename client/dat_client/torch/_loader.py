"""A data loader whose batches have Q(x) and Q(x + δ), with the codec's time hidden behind the training steps."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dat_client.calls.checks import integer, share
from dat_client.calls.core import Discretized
from dat_client.client import Client
from dat_client.errors import invalid
from dat_client.torch._adversarial import Attack
from dat_client.torch._images import (
    checked_images,
    checked_reconstruction,
    float_dtype,
    from_wire,
    to_device,
    to_wire,
)


class AdversarialBatch(NamedTuple):
    """One batch on the trainer's device; images are float [N,3,H,W] in 0..1.

    Attributes:
        images: x.
        reconstruction: Q(x).
        adversarial: Q(x + δ); Q(x) if the batch was not attacked (`mix`).
        rest: the elements after the images in the loader's batch, in their order (labels, targets, a second view).
        position: 0 for the first batch of this pass over the loader.
        tokens_changed: the share of the tokens that the step changed; None if the codec has no tokens.
        loss: the loss at the point where the gradient was taken, detached; None if the batch was not attacked.
        waited_s: seconds for which the training loop waited for the codec's answers.
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
    """Iterates over `loader` and adds to each batch its discrete adversarial examples (Algorithm 1, lines 2-5).

        loader = AdversarialLoader(data, client, lambda x, y: F.cross_entropy(model(x), y), model=model, depth=1)
        for batch in loader:
            loss = F.cross_entropy(model(batch.adversarial), *batch.rest)

    `depth=0` is exactly Algorithm 1: a batch is attacked at the weights that it then trains, and the loop waits for
    the codec. `depth=k` attacks each batch k training steps before its turn, so that the codec works while the
    model trains; the attack uses weights that are k steps old, and nothing else changes. The weights are only
    read between the steps, in the thread of the training loop. Q(x), which does not depend on the weights, is
    requested for `prefetch` further batches, and the loader is read ahead that far.

    An error in a batch is raised when the batch's turn has come, with its position in the exception's notes; the
    batches before it are complete. Leaving the loop early cancels the requests that wait. Every pass over this
    object is a new pass over `loader`.

    Args:
        loader: gives tuples or lists, the images first: [N,3,H,W], uint8 or float in 0..1 before normalisation.
            It is read ahead, so each batch must have memory of its own. With several ranks it must shard the data
            itself (DistributedSampler), under Lightning too.
        client: a Client, of which at most `depth + prefetch + 1` connections are used.
        loss_fn: returns the loss to be attacked, as for `adversarial`, of x̂ and the elements after the images (on
            the device). It is called between the training steps, so it must enter autocast itself if it needs it.
        model: the module, or modules, that `loss_fn` calls; they are left as they were.
        depth: training steps between the attack on a batch and its turn.
        prefetch: further batches whose Q(x) is requested ahead.
        precomputed: the second element of each batch is Q(x) already (`dat precompute`), so it is not requested.
        mix: the share of the batches that are attacked, spread evenly and equally on all ranks. The others have
            Q(x) in place of Q(x + δ); precomputed, they need no request.
        device: the device of the batches; None for that of the model's first parameter.
        reduction, random_start, generator, gradient_dtype, output_dtype, timeout_s, parameters: as for
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
            client, model, reduction, random_start, generator, gradient_dtype, answer_options, parameters
        )

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[AdversarialBatch]:
        source = iter(self.loader)
        window: deque[_PendingBatch] = deque()
        position, ended = 0, False
        try:
            while True:
                # The batch that is attacked now needs its Q(x) before all batches further ahead, so its request is
                # sent first, and while the codec works on it, a slow `loader` is read.
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
        """Reads the loader's next batch and requests its Q(x); returns False at the end."""
        with pending.noting_errors("reading it from the loader"):
            try:
                batch = next(source)
            except StopIteration:
                return False
            leading = 2 if self.precomputed else 1
            is_sequence = isinstance(batch, tuple | list)
            if not is_sequence or len(batch) < leading:
                limit = f"a tuple or list ({'images, Q(x)' if self.precomputed else 'images'}, ...) for each batch"
                found = type(batch).__name__ + (f" of {len(batch)}" if is_sequence else "")
                raise invalid("loader", limit, found=found)
            pending.images, pending.rest = checked_images(batch[0]).detach(), tuple(batch[leading:])
            pending.sent = to_wire(pending.images)
            if self.precomputed:
                pending.reconstruction = checked_reconstruction(batch[1], pending.images)
            else:
                pending.future = self.client.submit(pending.sent, **self._attack.answer_options)
        return True

    def _request_adversarial(self, batch: _PendingBatch) -> None:
        """Takes the gradient for one batch (Algorithm 1, line 3) and sends the request for Q(x + δ) (line 4)."""
        if batch.attacked or batch.error is not None:
            return
        with batch.noting_errors("Q(x) and the gradient there"):
            device = self.device
            batch.images = from_wire(batch.images, device, float_dtype(batch.images))
            if batch.future is not None:
                batch.reconstruction = batch.answer().reconstruction
            batch.reconstruction = from_wire(batch.reconstruction, device, batch.images.dtype)
            batch.rest = _moved(batch.rest, device)
            batch.future, batch.attacked = None, True
            if int((batch.position + 1) * self.mix) == int(batch.position * self.mix):
                return
            if self._attack.generator is None:  # seeded at the first batch, used in all passes
                self._attack.generator = torch.Generator(device).manual_seed(torch.initial_seed())
            request, batch.loss = self._attack.request(
                batch.reconstruction, lambda x_hat: self.loss_fn(x_hat, *batch.rest)
            )
            batch.future = self.client.submit(batch.sent, **request)

    def _finish(self, batch: _PendingBatch) -> AdversarialBatch:
        """Returns the batch whose turn has come, or raises its error."""
        with batch.noting_errors("Q(x + δ)"):
            if batch.error is None:
                adversarial, tokens_changed = batch.reconstruction, None
                if batch.future is not None:
                    answer = batch.answer()
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
        """The device of the batches."""
        if self._device is not None:
            return torch.device(self._device)
        parameters = (parameter for module in self._attack.modules for parameter in module.parameters())
        first = next(parameters, None)
        return torch.device("cpu") if first is None else first.device


@dataclass(eq=False)
class _PendingBatch:
    """A batch on its way through the window of batches that were read but not yet trained on."""

    position: int
    images: Tensor = field(init=False)
    sent: Tensor = field(init=False)
    reconstruction: Any = field(init=False)
    rest: tuple[Any, ...] = field(init=False)
    future: Future[Discretized] | None = None  # of Q(x), then of Q(x + δ)
    attacked: bool = False  # also set if `mix` spares the batch
    loss: Tensor | None = None
    error: Exception | None = None
    waited_s: float = 0.0

    def answer(self) -> Discretized:
        """Waits for the codec's answer and returns it."""
        assert self.future is not None
        begun = time.perf_counter()
        try:
            return self.future.result()
        finally:
            self.waited_s += time.perf_counter() - begun

    @contextmanager
    def noting_errors(self, activity: str) -> Iterator[None]:
        """Keeps an exception until the batch's turn, with a note on the batch and the activity."""
        try:
            yield
        except Exception as error:
            error.add_note(f"AdversarialLoader: batch {self.position}, {activity}")
            self.error = error


def _moved(value: Any, device: torch.device) -> Any:
    """Returns `value` with all tensors inside tuples, lists and dicts on the device."""
    if isinstance(value, Tensor):
        return to_device(value, device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value
