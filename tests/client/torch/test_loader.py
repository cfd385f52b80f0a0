from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dat_client import Client, Discretized, InvalidRequest, Unavailable
from dat_client.torch import AdversarialBatch, AdversarialLoader, adversarial
from dat_client.torch._loader import _PendingBatch


class HeldBackClient:
    """A stand-in for Client: answers x itself, and only when it is told to; keeps the order of the requests."""

    def __init__(self, hold: bool = False) -> None:
        self.asked: list[tuple[str, Any, Future[Discretized]]] = []
        self.hold = hold

    def submit(self, images: Tensor, gradients: Tensor | None = None, **options: Any) -> Future[Discretized]:
        future: Future[Discretized] = Future()
        name = "reconstruction" if gradients is None else "adversarial"
        self.asked.append((name, int(images[0, 0, 0, 0]), future))
        answer = Discretized(tokens_changed=0.5, **{name: images})
        if self.hold and gradients is not None:
            later = 0.05 * sum(future.done() is False for _, _, future in self.asked)
            threading.Timer(later, lambda: future.cancelled() or future.set_result(answer)).start()
        else:
            future.set_result(answer)
        return future

    def order(self) -> list[str]:
        return [f"{name[0]}{number}" for name, number, _ in self.asked]


def numbered(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose pixels are their number."""
    return [(torch.full((2, 3, 8, 8), i, dtype=torch.uint8), torch.full((2,), i)) for i in range(count)]


def attack(images: Tensor, *rest: Any) -> Tensor:
    return images.sum()


@pytest.mark.parametrize("depth", [0, 1, 3, 10])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("hold", [False, True])
def test_batches_come_whole_and_in_order(depth: int, prefetch: int, hold: bool) -> None:
    client = HeldBackClient(hold)
    loader = AdversarialLoader(
        numbered(5), client, attack, model=[], depth=depth, prefetch=prefetch, random_start=0.0
    )
    assert len(loader) == 5
    for _ in range(2):  # a second pass is a new one
        batches = list(loader)
        assert [batch.position for batch in batches] == [0, 1, 2, 3, 4]
        for i, batch in enumerate(batches):
            for pictures in (batch.images, batch.reconstruction, batch.adversarial):
                assert torch.equal(pictures, torch.full((2, 3, 8, 8), i / 255))
            assert batch.rest[0].tolist() == [i, i]
            assert batch.tokens_changed == 0.5
            assert torch.isclose(batch.loss, batch.images.sum())
    assert list(AdversarialLoader([], client, attack, model=[], depth=depth)) == []


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_batch_is_attacked_depth_steps_before_its_turn(depth: int) -> None:
    steps = 0
    attacked: dict[int, int] = {}

    def attack(images: Tensor, number: Tensor) -> Tensor:
        attacked[int(number[0])] = steps
        return images.sum()

    for batch in AdversarialLoader(numbered(6), HeldBackClient(), attack, model=[], depth=depth):
        assert batch.position == steps
        steps += 1
    assert attacked == {i: max(0, i - depth) for i in range(6)}


def test_q_is_asked_for_ahead_and_no_further() -> None:
    read = []

    def source() -> Iterator[Any]:
        for batch in numbered(9):
            read.append(int(batch[1][0]))
            yield batch

    client = HeldBackClient()
    loader = iter(AdversarialLoader(source(), client, attack, model=[], depth=1, prefetch=2))
    next(loader)
    assert read == [0, 1, 2, 3]
    assert client.order() == ["r0", "r1", "a0", "a1", "r2", "r3"]
    next(loader)
    assert client.order()[6:] == ["a2", "r4"]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_of_the_data_comes_at_its_turn(depth: int) -> None:
    def source() -> Iterator[Any]:
        yield from numbered(3)
        raise OSError("disk")

    seen = []
    loader = AdversarialLoader(source(), HeldBackClient(), attack, model=[], depth=depth)
    with pytest.raises(OSError, match="disk") as caught:
        seen.extend(batch.position for batch in loader)
    assert seen == [0, 1, 2]
    assert caught.value.__notes__ == ["AdversarialLoader: batch 3, reading it from the loader"]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_of_the_loss_comes_at_its_turn(depth: int) -> None:
    def attack(images: Tensor, number: Tensor) -> Tensor:
        if number[0] == 2:
            raise ValueError("no such class")
        return images.sum()

    seen = []
    loader = AdversarialLoader(numbered(6), HeldBackClient(), attack, model=[], depth=depth)
    with pytest.raises(ValueError, match="no such class") as caught:
        seen.extend(batch.position for batch in loader)
    assert seen == [0, 1]
    assert caught.value.__notes__ == ["AdversarialLoader: batch 2, Q(x) and the gradient there"]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (torch.zeros(1, 3, 8, 8), "tuple or list"),
        ({"images": 1}, "dict"),
        ((), "tuple of 0"),
        ((torch.zeros(3, 8, 8), 1), r"\[N,3,H,W\]"),
        (("no", "tensor"), "str"),
    ],
)
def test_batches_of_another_form_are_refused(batch: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        list(AdversarialLoader([batch], HeldBackClient(), attack, model=[]))
    assert "batch 0" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "options",
    [
        {"depth": -1},
        {"depth": 1.0},
        {"prefetch": True},
        {"mix": 1.5},
        {"mix": True},
        {"random_start": 2},
        {"outage_s": -1},
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AdversarialLoader([], HeldBackClient(), attack, model=[], **options)
    assert caught.value.field == next(iter(options))


def test_an_interrupt_does_not_wait_for_a_service_that_hangs(server) -> None:
    server.faults.extend(["", *["hang"] * 9])

    def attack(images: Tensor, *rest: Any) -> Tensor:
        raise KeyboardInterrupt

    with Client(server.url, timeout_s=2, max_connections=1) as client:
        with pytest.raises(KeyboardInterrupt):
            next(iter(AdversarialLoader(numbered(9), client, attack, model=[], prefetch=5)))
        begun = time.monotonic()
    assert time.monotonic() - begun < 4  # one request was under way, for 2 s; the other four are dropped


def test_waiting_requests_are_cancelled() -> None:
    client = HeldBackClient(hold=True)
    loader = iter(AdversarialLoader(numbered(9), client, attack, model=[], depth=3))
    next(loader)
    loader.close()
    pending = [future for name, _, future in client.asked if name == "adversarial"][1:]
    assert any(future.cancelled() for future in pending)


def test_a_batch_is_freed_without_the_garbage_collector() -> None:
    """In a cycle of references a batch would hold memory of the GPU until the collector comes to it."""
    received = 0
    gc.collect()
    gc.disable()
    try:
        for batch in AdversarialLoader(numbered(6), HeldBackClient(), attack, model=[], depth=1):
            received += 1
            del batch
        kept = [thing for thing in gc.get_objects() if type(thing) is _PendingBatch]
    finally:
        gc.enable()
    assert received == 6
    assert not kept


def test_precomputed_reconstructions_are_not_asked_for() -> None:
    client = HeldBackClient()
    data = [(x, torch.full_like(x, 100), y) for x, y in numbered(3)]
    batches = list(AdversarialLoader(data, client, attack, model=[], depth=1, precomputed=True))
    assert client.order() == ["a0", "a1", "a2"]
    assert all(torch.equal(b.reconstruction, torch.full((2, 3, 8, 8), 100 / 255)) for b in batches)
    assert [b.rest[0][0].item() for b in batches] == [0, 1, 2]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(
    ("mix", "attacked"), [(0.0, []), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (0.75, [1, 2, 3, 5, 6, 7])]
)
def test_a_share_of_the_batches_is_attacked(mix: float, attacked: list[int], depth: int) -> None:
    client = HeldBackClient()
    data = [(x, torch.full_like(x, 100), y) for x, y in numbered(8)]
    loader = AdversarialLoader(data, client, attack, model=[], depth=depth, precomputed=True, mix=mix)
    batches = list(loader)
    assert client.order() == [f"a{i}" for i in attacked]
    for i, batch in enumerate(batches):
        assert torch.equal(batch.images, torch.full((2, 3, 8, 8), i / 255))
        assert batch.rest[0][0].item() == i
        if i in attacked:
            assert torch.equal(batch.adversarial, batch.images)  # as the stand-in answers
            assert batch.loss is not None
            assert batch.tokens_changed == 0.5
        else:
            assert torch.equal(batch.adversarial, torch.full((2, 3, 8, 8), 100 / 255))
            assert (batch.loss, batch.tokens_changed, batch.waited_s) == (None, None, 0)
    client = HeldBackClient()
    online = list(AdversarialLoader(numbered(8), client, attack, model=[], depth=depth, mix=mix))
    assert sorted(client.order()) == sorted([f"r{i}" for i in range(8)] + [f"a{i}" for i in attacked])
    assert all(torch.equal(batch.adversarial, batch.images) for batch in online)


def test_what_follows_the_images_goes_to_the_device() -> None:
    rest = {"boxes": [torch.zeros(1, 4)], "name": "a", "pair": (torch.ones(1), 2)}
    device = torch.device("meta")
    from dat_client.torch._loader import _moved

    moved = _moved(rest, device)
    assert moved["boxes"][0].device == moved["pair"][0].device == device
    assert (moved["name"], moved["pair"][1]) == ("a", 2)
    named = AdversarialBatch(*[torch.zeros(1)] * 3, (1,), 0, None, torch.zeros(()), 0.0)
    assert isinstance(_moved(named, device), AdversarialBatch)


def test_depth_0_is_adversarial(codec: Client, model: nn.Module, x: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[3].p = 0.0

    def train(adversarial_images: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial_images), labels).backward()
        optimizer.step()

    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = []
    for _ in range(3):
        q = adversarial(
            codec, x, lambda i: F.cross_entropy(model(i), labels), model=model, alpha=10.0, random_start=0
        )
        expected.append(q.adversarial)
        train(q.adversarial)
    weights = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(start)
    loader = AdversarialLoader(
        [[x, labels]] * 3, codec, lambda i, y: F.cross_entropy(model(i), y), model=model, alpha=10.0, random_start=0
    )
    for batch, want in zip(loader, expected, strict=True):
        assert torch.equal(batch.adversarial, want)
        train(batch.adversarial)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert not torch.equal(expected[0], expected[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_with_workers(
    codec: Client, model: nn.Module, x: Tensor, labels: Tensor, workers: int
) -> None:
    data = DataLoader(TensorDataset(x, labels), batch_size=2, num_workers=workers)
    loader = AdversarialLoader(
        data, codec, lambda i, y: F.cross_entropy(model(i), y), model=model, depth=1, preset="easyrobust"
    )
    batches = list(loader)
    assert [batch.rest[0].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert torch.equal(torch.cat([batch.images for batch in batches]), x / 255)


def test_a_dead_service_ends_the_loop_with_the_batch_named(codec_url: str, model: nn.Module) -> None:
    with Client("http://127.0.0.1:9", timeout_s=0.5) as client:
        begun = time.monotonic()
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9") as caught:
            list(AdversarialLoader(numbered(3), client, attack, model=model, depth=1))
        assert time.monotonic() - begun < 10
    assert caught.value.__notes__ == ["AdversarialLoader: batch 0, Q(x) and the gradient there"]
