"""What loaders and loss functions give works with the right values, or is refused with what to write instead."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_client import Client, InvalidRequest
from dat_client.torch import AdversarialBatch, AdversarialLoader, adversarial, straight_through

X8 = torch.arange(4 * 3 * 16 * 16).reshape(4, 3, 16, 16).remainder(251).to(torch.uint8)
X = X8 / 255
LABELS = torch.arange(4)
Batch = namedtuple("Batch", "images labels")


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4)
    )


@pytest.fixture
def attack(network: nn.Module) -> Callable[..., Tensor]:
    return lambda images, labels: F.cross_entropy(network(images), labels)


def attacked(client: Client, data: Any, loss_fn: Any, model: Any, **options: Any) -> list[AdversarialBatch]:
    return list(AdversarialLoader(data, client, loss_fn, model=model, depth=1, random_start=0, **options))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("x", [X8, X], ids=["uint8", "float"])
def test_where_gradients_are_off_the_batches_can_still_be_trained_on(client, network, attack, mode, x) -> None:
    (expected,) = attacked(client, [(x, LABELS)], attack, network)
    with mode():
        (batch,) = attacked(client, [(x.clone(), {"y": LABELS.clone()})], lambda i, y: attack(i, y["y"]), network)
        q = adversarial(client, x.clone(), lambda i: attack(i, LABELS), model=network)
    assert torch.equal(batch.loss, expected.loss)
    for tensor in (batch.images, batch.reconstruction, batch.adversarial, batch.rest[0]["y"], q.adversarial):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    assert torch.equal(batch.adversarial, X)
    F.cross_entropy(network(batch.adversarial), batch.rest[0]["y"]).backward()
    assert network[0].weight.grad.abs().sum() > 0


def test_tensors_that_a_loader_made_in_inference_mode_are_taken(client, network, attack) -> None:
    with torch.inference_mode():
        data = [(X.clone(), LABELS.clone()), (X8.clone(), LABELS.clone())]
    for batch in attacked(client, data, attack, network):
        assert torch.equal(batch.images, X)
        F.cross_entropy(network(batch.images), batch.rest[0]).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_any_float_dtype_come_back_in_it(client, network, dtype) -> None:
    model = copy.deepcopy(network).to(dtype)
    (batch,) = attacked(client, [(X.to(dtype), LABELS)], lambda i, y: F.cross_entropy(model(i), y), model)
    assert {batch.images.dtype, batch.reconstruction.dtype, batch.adversarial.dtype} == {dtype}
    assert torch.allclose(batch.adversarial.float(), X, atol=4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert straight_through(client, X.to(dtype)).dtype == dtype
    (converted,) = attacked(
        client, [(X.to(dtype), LABELS)], lambda i, y: F.cross_entropy(network(i.float()), y), network
    )
    assert converted.loss > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_dtype_is_named_beside_torchs_error(client, network, attack, dtype) -> None:
    with pytest.raises(RuntimeError, match="should be the same") as caught:
        attacked(client, [(X.to(dtype), LABELS)], attack, network)
    assert f"x̂ has the dtype of the images, {dtype}, and the model has torch.float32" in caught.value.__notes__[0]
    assert ".float()" in caught.value.__notes__[0]


@pytest.mark.parametrize("x", [X8[:0], X[:0]], ids=["uint8", "float"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_a_batch_of_no_images_comes_back_without_a_request(client, server, network, attack, x, precomputed) -> None:
    some = (X8, X8, LABELS) if precomputed else (X8, LABELS)
    none = (x, x, LABELS[:0]) if precomputed else (x, LABELS[:0])
    batches = attacked(client, [none, some, none], attack, network, precomputed=precomputed)
    assert [len(batch.images) for batch in batches] == [0, 4, 0]
    for batch in (batches[0], batches[2]):
        for images in batch[:3]:
            assert (images.shape, images.dtype) == ((0, 3, 16, 16), torch.float32)
        assert (batch.loss, batch.tokens_changed, batch.rest[0].tolist()) == (None, None, [])
    assert torch.equal(batches[1].adversarial, X)
    requests = len(server.requests)
    q = adversarial(client, x, lambda i: attack(i, LABELS[:0]), model=network)
    assert (q.adversarial.shape, q.reconstruction.shape, q.loss.item(), q.tokens_changed) == (
        x.shape,
        x.shape,
        0,
        None,
    )
    assert straight_through(client, x).shape == x.shape
    assert len(server.requests) == requests


def test_no_images_of_a_wrong_shape_are_refused(client, network, attack) -> None:
    with pytest.raises(InvalidRequest, match=r"images: got shape \[0, 1, 16, 16\]"):
        attacked(client, [(X8[:0, :1], LABELS[:0])], attack, network)


@pytest.mark.parametrize(
    "batch", [(X8, LABELS), [X8, LABELS], Batch(X8, LABELS)], ids=["tuple", "list", "namedtuple"]
)
def test_sequences_are_taken(client, network, attack, batch) -> None:
    (answer,) = attacked(client, [batch], attack, network)
    assert torch.equal(answer.adversarial, X)
    assert answer.rest[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("batch", "cure"),
    [
        ({"image": X8, "label": LABELS}, r"collate_fn .* return \(images, labels, \.\.\.\), here made of "
         r"batch\['image'\], batch\['label'\]"),
        (X8, r"collate_fn of the loader return \(images, labels, \.\.\.\)"),
        ((X8.numpy(), LABELS), "convert it with torch.from_numpy"),
        ((X.to_sparse(), LABELS), r"\.to_dense\(\)"),
        ((X.to("meta"), LABELS), "tensor with data"),
        ((X8.permute(0, 2, 3, 1), LABELS), r"channels last, transpose them to \[N,3,H,W\]"),
    ],
    ids=["dict", "tensor", "numpy", "sparse", "meta", "NHWC"],
)  # fmt: skip
def test_other_batches_are_refused_with_what_to_write(client, server, network, attack, batch, cure) -> None:
    with pytest.raises(InvalidRequest, match=cure):
        attacked(client, [batch], attack, network)
    assert not server.requests
    assert torch.equal(attacked(client, [(X8, LABELS)], attack, network)[0].adversarial, X)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("returned", ["loss", "number"])
def test_a_loss_fn_that_calls_backward_is_refused_and_its_gradients_are_undone(
    client, network, attack, retain: bool, returned: str
) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    attack(X, LABELS).backward()
    grads = [p.grad for p in network.parameters()]
    values = [grad.clone() for grad in grads]

    def trains(images: Tensor, labels: Tensor) -> Any:
        optimizer.zero_grad()
        loss = attack(images, labels)
        loss.backward(retain_graph=retain)
        return loss if returned == "loss" else loss.item()

    with pytest.raises(
        InvalidRequest, match=r"loss_fn: it calls backward\(\), must only .*: remove backward\(\)"
    ) as caught:
        attacked(client, [(X8, LABELS)], trains, network)
    assert caught.value.field == "loss_fn"
    assert all(p.grad is grad for p, grad in zip(network.parameters(), grads, strict=True))
    assert all(torch.equal(grad, value) for grad, value in zip(grads, values, strict=True))


def test_gradients_that_a_loss_fn_sets_are_undone(client, network, attack) -> None:
    def sets(images: Tensor, labels: Tensor) -> Tensor:
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        return attack(images, labels)

    attacked(client, [(X8, LABELS)], sets, network)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda loss: loss + torch.inf, "the loss is inf, must be finite"),
        (lambda loss: loss * 0 + torch.nan, "the loss is nan, must be finite"),
        (lambda loss: loss * 1j, "the loss is torch.complex64, must be real"),
        (lambda loss: loss.detach(), r"does not depend .* without torch.no_grad\(\), \.detach\(\) and \.item\(\)"),
        (
            lambda loss: (loss, 1),
            r"the loss is tuple, must be a tensor: a scalar, or one value for each",
        ),
        (lambda loss: loss[None], r"the loss is a tensor \[1\], must be a tensor: a scalar"),
    ],
)
def test_losses_that_cannot_be_attacked(client, network, attack, change, says) -> None:
    with pytest.raises(InvalidRequest, match=says):
        adversarial(client, X8, lambda images: change(attack(images, LABELS)), model=network)


def test_a_model_made_in_inference_mode_is_refused(client) -> None:
    with torch.inference_mode():
        model = nn.Conv2d(3, 1, 3)
    with pytest.raises(InvalidRequest, match=r"make the model outside torch\.inference_mode\(\)"):
        adversarial(client, X8, lambda images: model(images).sum(), model=model)


@pytest.mark.parametrize(
    "x",
    [
        X.contiguous(memory_format=torch.channels_last),
        X.clone().requires_grad_(),
        X.clone().requires_grad_() * 1.0,
    ],
    ids=["channels_last", "requires_grad", "not a leaf"],
)
def test_layouts_and_graphs_of_the_images_do_not_matter(client, network, attack, x: Tensor) -> None:
    (batch,) = attacked(client, [(x, LABELS)], attack, network)
    (expected,) = attacked(client, [(X, LABELS)], attack, network)
    assert torch.equal(batch.adversarial, expected.adversarial)
    assert torch.isclose(batch.loss, expected.loss)
    assert not batch.images.requires_grad
    assert not x.is_leaf or x.grad is None
