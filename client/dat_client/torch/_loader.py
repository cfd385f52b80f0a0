"""A data loader whose batches come with Q(x) and Q(x + δ), the codec's time hidden behind the training steps."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dat_client.calls.core import Discretized
from dat_client.client import Client
from dat_client.errors import InvalidRequest, shown

from ._adversarial import RandomStart, attack, check_client
from ._gradient import check_reduction, checked_modules
from ._pictures import check_reconstruction, checked, float_dtype, from_wire, moved, to_wire


class AdversarialBatch(NamedTuple):
    """One batch, on the trainer's device; pictures are float [N,3,H,W] in 0..1.

    Attributes:
        images: x.
        reconstruction: Q(x).
        adversarial: Q(x + δ); Q(x) where the batch was not attacked (`mix`).
        rest: what followed the images in the loader's batch, in its order (labels, targets, a second view).
        position: 0 for the first batch of this pass over the loader.
        tokens_changed: the share of the tokens that the step changed; None where the codec has no tokens.
        loss: what `loss_fn` gave where the gradient was taken, detached; None where the batch was not attacked.
        waited_s: seconds for which the loop stood still because the codec had not answered.
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
    """Iterates over `loader`, each batch with its discrete adversarial examples (Algorithm 1, lines 2-5).

        loader = AdversarialLoader(data, client, lambda x, y: F.cross_entropy(model(x), y), model=model, depth=1)
        for batch in loader:
            loss = F.cross_entropy(model(batch.adversarial), *batch.rest)

    `depth=0` is Algorithm 1 to the letter: a batch is attacked at the weights that it then trains, and the loop
    waits for the codec. `depth=k` attacks each batch k training steps before its turn, so that the codec
    works while the model trains; the attack is k steps old, all else is the same. The weights are only read
    between the steps, in the loop's own thread. Q(x), which no weights change, is asked for `prefetch` batches
    further ahead, and that far the loader is read ahead.

    What goes wrong with a batch is raised when its turn has come, with its position in the exception's notes;
    the batches before it come whole. Leaving the loop early drops what was asked for. Every pass over this
    object is a new pass over `loader`.

    Args:
        loader: gives tuples or lists, the images first: [N,3,H,W], uint8 or float in 0..1 before normalisation.
            It is read ahead, so each batch must have memory of its own. With several ranks it shards the data
            itself (DistributedSampler), under Lightning too.
        client: a Client; it needs `depth + prefetch + 1` connections at most.
        loss_fn: from x̂ and what followed the images (on the device) to the loss to be attacked, as for
            `adversarial`. It is called between the steps: where it needs autocast, it enters it itself.
        model: the module, or modules, that `loss_fn` calls; they come out as they went in.
        depth: training steps between the attack on a batch and its turn.
        prefetch: batches whose Q(x) is asked for beyond those.
        precomputed: the second of each batch is Q(x) already (`dat precompute`): nothing is asked for twice.
        mix: the share of the batches that are attacked, spread evenly and alike on all ranks. The others come
            with Q(x) in the place of Q(x + δ); precomputed, they cost no request.
        device: where pictures and the rest go; None: where the model's first parameter is.
        reduction, random_start, generator, gradient_dtype, output_dtype, timeout_s, parameters: as for
            `adversarial`.

    Raises InvalidRequest for arguments that are wrong; while iterating, what `adversarial` and `loader` raise.
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
        for name, value in (("depth", depth), ("prefetch", prefetch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                message = f"{name}: must be an integer of 0 or more, got {shown(value)}"
                raise InvalidRequest(message, field=name, value=value, limit=">= 0")
        if isinstance(mix, bool) or not isinstance(mix, (int, float)) or not 0 <= mix <= 1:
            message = f"mix: must be a share, 0..1, got {shown(mix)}"
            raise InvalidRequest(message, field="mix", value=mix, limit="0..1")
        check_client(client)
        check_reduction(reduction)
        self.loader = loader
        self.client = client
        self.loss_fn = loss_fn
        self.modules = checked_modules(model)
        self.depth = depth
        self.prefetch = prefetch
        self.precomputed = precomputed
        self.mix = mix
        self.reduction = reduction
        self.generator = generator
        self.parameters = parameters
        self._device = device
        self._start = RandomStart.from_parameters(random_start, parameters)
        self._asking: dict[str, Any] = {"output_dtype": output_dtype, "timeout_s": timeout_s}
        self._gradient_dtype = gradient_dtype

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[AdversarialBatch]:
        source = iter(self.loader)
        window: deque[_Turn] = deque()
        position, ended = 0, False
        try:
            while True:
                # Q(x + δ) of the batch that is attacked now is needed before any Q(x) further ahead, so it is
                # asked for first, and a slow `loader` is read while the codec works on it.
                for ahead in (self.depth + 1, self.depth + 1 + self.prefetch):
                    while not ended and len(window) < ahead:
                        turn = _Turn(position)
                        ended = not self._read(source, turn) or turn.error is not None
                        if not ended or turn.error is not None:
                            window.append(turn)
                        position += 1
                    for turn in itertools.islice(window, self.depth + 1):
                        self._attack(turn)
                        if turn.error is not None:
                            break
                if not window:
                    return
                yield self._finish(window[0])
                window.popleft()
        finally:
            for turn in window:
                if turn.asked is not None:
                    turn.asked.cancel()

    def _read(self, source: Iterator[Any], turn: _Turn) -> bool:
        """The loader's next batch, and Q(x) asked for; False at the end."""
        with turn.noting("reading it from the loader"):
            try:
                batch = next(source)
            except StopIteration:
                return False
            lead = 2 if self.precomputed else 1
            if not isinstance(batch, (tuple, list)) or len(batch) < lead:
                limit = "(images, Q(x), ...)" if self.precomputed else "(images, ...)"
                found = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
                message = f"loader: a batch must be a tuple or list {limit}, got {found}"
                raise InvalidRequest(message, field="loader", value=found, limit=limit)
            turn.images, turn.rest = checked(batch[0]).detach(), tuple(batch[lead:])
            turn.sent = to_wire(turn.images)
            if self.precomputed:
                turn.reconstruction = check_reconstruction(batch[1], turn.images)
            else:
                turn.asked = self.client.submit(turn.sent, **self._asking)
        return True

    def _attack(self, turn: _Turn) -> None:
        """Line 3 of Algorithm 1 for one batch, and the request for line 4 sent."""
        if turn.attacked or turn.error is not None:
            return
        with turn.noting("Q(x) and the gradient there"):
            device = self.device
            turn.images = from_wire(turn.images, device, float_dtype(turn.images))
            if turn.asked is not None:
                turn.reconstruction = turn.answer().reconstruction
            turn.reconstruction = from_wire(turn.reconstruction, device, turn.images.dtype)
            turn.rest = _moved(turn.rest, device)
            turn.asked, turn.attacked = None, True
            if int((turn.position + 1) * self.mix) == int(turn.position * self.mix):
                return
            step = attack(
                turn.reconstruction,
                lambda x_hat: self.loss_fn(x_hat, *turn.rest),
                self.modules,
                self.reduction,
                self._start,
                self._generator(device),
                self.parameters,
            )
            turn.loss = step.loss
            turn.asked = self.client.submit(
                turn.sent,
                step.gradients,
                gradient_dtype=self._gradient_dtype,
                outputs=["adversarial"],
                **self._asking,
                **step.parameters,
            )

    def _finish(self, turn: _Turn) -> AdversarialBatch:
        """The batch whose turn it is; raises what went wrong with it."""
        with turn.noting("Q(x + δ)"):
            if turn.error is None:
                adversarial, tokens_changed = turn.reconstruction, None
                if turn.asked is not None:
                    answer = turn.answer()
                    adversarial = from_wire(answer.adversarial, turn.images.device, turn.images.dtype)
                    tokens_changed = answer.tokens_changed
                return AdversarialBatch(
                    turn.images,
                    turn.reconstruction,
                    adversarial,
                    turn.rest,
                    turn.position,
                    tokens_changed,
                    turn.loss,
                    turn.waited_s,
                )
        assert turn.error is not None
        raise turn.error

    def _generator(self, device: torch.device) -> torch.Generator:
        """The one given, or one of this loader's own, seeded as torch was at its first batch."""
        if self.generator is None:
            self.generator = torch.Generator(device).manual_seed(torch.initial_seed())
        return self.generator

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        if self._device is not None:
            return torch.device(self._device)
        first = next((p for module in self.modules for p in module.parameters()), None)
        return torch.device("cpu") if first is None else first.device


class _Turn:
    """A batch on its way through the window."""

    images: Tensor
    sent: Tensor
    reconstruction: Any
    rest: tuple[Any, ...]

    def __init__(self, position: int) -> None:
        self.position = position
        self.asked: Future[Discretized] | None = None
        self.attacked = False  # or passed by, by `mix`
        self.loss: Tensor | None = None
        self.error: Exception | None = None
        self.waited_s = 0.0

    def answer(self) -> Discretized:
        """The codec's, waited for."""
        assert self.asked is not None
        begun = time.perf_counter()
        try:
            return self.asked.result()
        finally:
            self.waited_s += time.perf_counter() - begun

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Keeps an exception until the batch's turn, with a note on where it happened."""
        try:
            yield
        except Exception as error:
            error.add_note(f"AdversarialLoader: batch {self.position}, {what}")
            self.error = error


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dicts on the device; all else as it is."""
    if isinstance(value, Tensor):
        return moved(value, device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value
