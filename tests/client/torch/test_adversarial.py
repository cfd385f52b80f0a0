from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_client import Client, InvalidRequest, Unavailable
from dat_client.torch import adversarial
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.perturbation import Step


class Recording:
    """A client that keeps what it was asked."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.asked: list[dict[str, Any]] = []

    def discretize(self, images: Any, gradients: Any = None, **options: Any) -> Any:
        self.asked.append({"images": images, "gradients": gradients} | options)
        return self.client.discretize(images, gradients, **options)


def state(model: nn.Module) -> list[Any]:
    """All that the attack must leave alone."""
    kept: list[Any] = [torch.get_rng_state(), torch.tensor(model.training)]
    kept += [tensor.clone() for tensor in model.state_dict().values()]
    return kept + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def attack(model: nn.Module, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: F.cross_entropy(model(images), labels)


@pytest.mark.parametrize("preset", ["paper", "easyrobust"])
def test_algorithm_1(codec: Client, model: nn.Module, x: Tensor, labels: Tensor, preset: str) -> None:
    model.eval()
    q = adversarial(
        codec, x, lambda i: F.cross_entropy(model(i), labels), model=model, preset=preset, random_start=0,
        gradient_dtype="FP32", output_dtype="FP32",
    )  # fmt: skip
    discretizer = Discretizer.from_store("tiny-f8", EngineConfig(device="cpu"))
    x_hat = torch.from_numpy(discretizer.discretize(x.numpy(), output_dtype="FP32")["reconstruction"])
    x_hat.requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x_hat), labels, reduction="sum"), x_hat)
    base = {"paper": "x", "easyrobust": "reconstruction"}[preset]
    step = Step(base=base, normalize="none" if preset == "paper" else "l2", alpha=0.1)
    expected = discretizer.discretize(x.numpy(), g.numpy(), step=step, output_dtype="FP32")["adversarial"]
    assert torch.equal(q.reconstruction, x_hat.detach())
    assert np.array_equal(q.adversarial.numpy(), expected)
    assert q.tokens_changed is not None
    assert q.loss.ndim == 0
    assert not q.loss.requires_grad


@pytest.mark.parametrize("random_start", [0.0, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_everything_as_it_found_it(
    codec: Client, model: nn.Module, x: Tensor, labels: Tensor, training: bool, random_start: float
) -> None:
    model.train(training)
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    before = state(model)
    seen = []

    def attack(images: Tensor) -> Tensor:
        seen.append(images.clone())
        model.queue = model.queue + 1  # as a momentum queue does
        return F.cross_entropy(model(images), labels)

    adversarial(codec, x, attack, model=model, preset="easyrobust", random_start=random_start)
    assert seen
    after = state(model)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers


def test_gradients_that_were_none_stay_none(codec: Client, model: nn.Module, x: Tensor, attack: Any) -> None:
    model.zero_grad(set_to_none=True)
    adversarial(codec, x, attack, model=model)
    assert all(p.grad is None for p in model.parameters())


def test_state_comes_back_after_an_error(codec: Client, model: nn.Module, x: Tensor) -> None:
    before = state(model)

    def attack(images: Tensor) -> Tensor:
        model(images)
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        adversarial(codec, x, attack, model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed(
    codec: Client, model: nn.Module, x: Tensor, labels: Tensor, attack: Any
) -> None:
    model[3].p = 0.0  # dropout would draw differently with and without
    model.zero_grad()
    clean = F.cross_entropy(model(x / 255), labels)
    clean.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    clean = F.cross_entropy(model(x / 255), labels)
    adversarial(codec, x, attack, model=model)
    clean.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_mean_sum_and_one_loss_an_image_are_the_same_attack(
    codec: Client, model: nn.Module, x: Tensor, labels: Tensor
) -> None:
    model.eval()
    asked = []
    for how, reduction in (("mean", "mean"), ("sum", "sum"), ("none", "mean")):
        client = Recording(codec)
        loss = nn.CrossEntropyLoss(reduction=how)
        adversarial(
            client, x, lambda i, loss=loss: loss(model(i), labels), model=model, reduction=reduction, random_start=0
        )
        asked.append(client.asked[1]["gradients"])
    assert torch.allclose(asked[0], asked[1], rtol=1e-5, atol=0)
    assert torch.allclose(asked[0], asked[2], rtol=1e-5, atol=0)
    client = Recording(codec)
    adversarial(client, x[:1], lambda i: F.cross_entropy(model(i), labels[:1]), model=model, random_start=0)
    assert torch.allclose(client.asked[1]["gradients"], asked[0][:1], rtol=1e-3, atol=1e-7)


def test_tiny_gradients_survive_half_precision(codec: Client, x: Tensor) -> None:
    half = nn.Conv2d(3, 1, 3).half()
    client = Recording(codec)
    q = adversarial(
        client, x, lambda i: half(i.half()).float().mean() * 1e-6, model=half, preset="easyrobust", random_start=0
    )
    assert client.asked[1]["gradients"].abs().amax((1, 2, 3)).min() > 0
    assert q.tokens_changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_a_gradient_scaler(
    codec: Client, model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype):
        q = adversarial(codec, x, lambda i: F.cross_entropy(model(i), labels), model=model)
        assert q.adversarial.dtype == torch.float32
        loss = F.cross_entropy(model(q.adversarial), labels)
    assert scaler.get_scale() == 2.0**10
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_image_whose_gradient_overflows_gets_no_delta(codec: Client, x: Tensor) -> None:
    calls = []

    def loss(images: Tensor) -> Tensor:
        calls.append(len(images))
        factor = torch.ones(x.shape)
        factor[1, 0, 0, 0] = torch.inf
        return (images * factor).nan_to_num(posinf=1.0).sum() + (images - images.detach()).mul(
            factor
        ).nan_to_num().sum()

    client = Recording(codec)
    with pytest.warns(RuntimeWarning, match=r"images \[1\] of 4: it counts as 0 there"):
        adversarial(client, x, loss, model=[], reduction="sum", random_start=0)
    assert calls == [4]  # a second pass on one of several ranks would leave the others waiting
    sent = client.asked[1]["gradients"]
    assert not sent[1].any()
    assert sent[[0, 2, 3]].abs().amin() > 0


def test_one_pass_under_fp16(codec: Client, x: Tensor, labels: Tensor) -> None:
    torch.manual_seed(0)
    half = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(14400, 4)).half()
    calls = []

    def loss(images: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(half(images.half()), labels)  # a loss in fp16, too

    for _ in range(3):
        adversarial(codec, x, loss, model=half)
    assert len(calls) == 3


def test_a_momentum_encoder_must_not_move_inside(codec: Client, model: nn.Module, x: Tensor) -> None:
    def loss(images: Tensor) -> Tensor:
        with torch.no_grad():
            model[0].weight.mul_(0.999)
        return model(images).sum()

    with pytest.raises(InvalidRequest, match="momentum encoder"):
        adversarial(codec, x, loss, model=model)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda i: {"a": i.sum()}, "dict"),
        (lambda i: i.mean((1, 2)), r"\[4, 32\]"),
        (lambda i: torch.tensor(1.0), "does not depend"),
        (lambda i: torch.tensor(1.0, requires_grad=True), "does not depend"),
        (lambda i: 1.0, "float"),
        (lambda i: (i * torch.nan).sum(), "is nan"),
    ],
)
def test_what_is_no_loss_is_refused(codec: Client, x: Tensor, loss: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        adversarial(codec, x, loss, model=[])
    assert caught.value.field == "loss_fn"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reduction": "none"}, "reduction"),
        ({"random_start": 1.5}, "random_start"),
        ({"random_start": 0.5, "preset": "paper"}, "random_start"),
        ({"random_start": 1.0, "alpha": "much"}, "alpha"),
        ({"preset": "authors"}, "preset"),
        ({"preset": "authors", "normalize": "l2", "random_start": 1.0}, "preset"),
        ({"gradient_dtype": ["FP16"]}, "gradient_dtype"),
        ({"reconstruction": torch.zeros(3)}, "reconstruction"),
        ({"reconstruction": torch.zeros(4, 3, 32, 32, dtype=torch.int64)}, "reconstruction"),
        ({"reconstruction": torch.full((4, 3, 32, 32), 2.0)}, "reconstruction"),
        ({"reconstruction": torch.zeros(4, 3, 32, 16)}, "reconstruction"),
        ({"model": torch.nn.Linear(1, 1).parameters()}, "model"),
        ({"model": len}, "model"),
        ({"client": "http://127.0.0.1:8000"}, "client"),
        ({"nonsense": 1}, "parameters"),
    ],
)
def test_wrong_options_are_named(codec: Client, x: Tensor, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        adversarial(**({"client": codec, "x": x, "loss_fn": lambda i: i.sum(), "model": []} | options))
    assert caught.value.field == field


def test_a_known_reconstruction_saves_a_request(codec: Client, x: Tensor, attack: Any, model: nn.Module) -> None:
    model.eval()
    whole = adversarial(codec, x, attack, model=model, random_start=0)
    client = Recording(codec)
    q = codec.discretize(x).reconstruction
    again = adversarial(client, x, attack, model=model, reconstruction=q, random_start=0)
    assert len(client.asked) == 1
    assert torch.equal(again.adversarial, whole.adversarial)


def test_a_random_start_is_part_of_delta(codec: Client, x: Tensor) -> None:
    generator = torch.Generator().manual_seed(7)
    client = Recording(codec)
    starts = []

    def loss(images: Tensor) -> Tensor:
        starts.append(images.detach().clone())
        return (images * torch.linspace(-1, 1, 32)).sum()

    options = {"preset": "easyrobust", "random_start": 1.0, "alpha": 0.3, "reduction": "sum"}
    for _ in range(2):
        q = adversarial(client, x, loss, model=[], generator=generator, **options)
    first, second = starts
    r = (first - q.reconstruction).flatten(1)
    assert ((r.norm(dim=1) > 0.1) & (r.norm(dim=1) < 0.301)).all()  # shorter where a pixel met 0 or 1
    assert not torch.equal(first, second)
    sent = client.asked[1]
    assert (sent["normalize"], sent["alpha"], sent["preset"]) == ("none", 1.0, "easyrobust")
    g = torch.linspace(-1, 1, 32).expand(x.shape)
    g = g / g[0].norm()
    delta = (r.view(x.shape) + 0.3 * g).flatten(1)
    delta = delta * (0.3 / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    assert torch.allclose(sent["gradients"].flatten(1), delta, atol=1e-5)
    replay = torch.Generator().manual_seed(7)
    starts.clear()
    adversarial(codec, x, loss, model=[], generator=replay, **options)
    assert torch.equal(starts[0], first)


def test_the_coin_of_the_random_start(codec: Client, x: Tensor) -> None:
    client = Recording(codec)
    for seed in range(20):
        adversarial(
            client, x[:1], lambda i: i.sum(), model=[], preset="easyrobust", reconstruction=x[:1],
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    started = [asked.get("normalize") == "none" for asked in client.asked]
    assert 10 <= sum(started) < 20  # of 20 with p = 0.8, by these seeds


def test_a_dead_service_says_so(x: Tensor, attack: Any, model: nn.Module) -> None:
    with Client("http://127.0.0.1:9", timeout_s=0.5) as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        adversarial(client, x, attack, model=model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_switched_off(
    codec: Client, x: Tensor, attack: Any, model: nn.Module, mode: Any
) -> None:
    model.eval()
    expected = adversarial(codec, x, attack, model=model, random_start=0).adversarial
    with mode():
        assert torch.equal(adversarial(codec, x, attack, model=model, random_start=0).adversarial, expected)
