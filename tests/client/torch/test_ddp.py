"""Two processes under DistributedDataParallel against one that holds the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_client import Client
from dat_client.torch import AdversarialLoader, adversarial, straight_through

STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 4))
    return nn.Sequential(*layers)


def train(model: nn.Module, client: Client, x: Tensor, labels: Tensor) -> None:
    """Each step has an attack, a straight-through loss and an adversarial one, on the same module."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def attack(images: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(images), y)

    for batch in AdversarialLoader([(x, labels)] * STEPS, client, attack, model=model, depth=1):
        optimizer.zero_grad()
        images = (x / 255).requires_grad_()
        loss = F.cross_entropy(model(straight_through(client, images)), labels)
        q = adversarial(client, x, lambda i: F.cross_entropy(model(i), labels), model=model, random_start=0)
        adversarial_loss = F.cross_entropy(model(batch.adversarial), labels)
        loss = loss + adversarial_loss + F.cross_entropy(model(q.adversarial), labels)
        loss.backward()
        assert images.grad is not None
        optimizer.step()


def rank_main(rank: int, port: int, url: str, data: str, out: str, static_graph: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    x, labels = torch.load(data, weights_only=True)
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=static_graph)
    with Client(url, timeout_s=60) as client:
        train(wrapped, client, x[rank::2], labels[rank::2])
    torch.save(model.state_dict(), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("static_graph", [False, True])
def test_two_ranks_train_as_one(
    codec: Client, x: Tensor, labels: Tensor, tmp_path: Path, static_graph: bool
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    data, out = tmp_path / "data.pt", tmp_path / "weights"
    torch.save((x, labels), data)
    torch.multiprocessing.spawn(rank_main, (port, codec.url, str(data), str(out), static_graph), nprocs=2)
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, codec, x, labels)
    ranks = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(ranks[0][name], ranks[1][name])
        # rounding moves a token in a thousand, so not to the last bit
        assert (ranks[0][name] - p).abs().max() < 0.05 * (p - old).abs().max(), name
