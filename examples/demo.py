"""Show the whole job: start the service, discretize photographs, train by DAT, and draw the results.

make demo                                            # on Ray Serve
python examples/demo.py --local                      # one process, without Ray
python examples/demo.py --url http://codec:8000      # against a service that runs already

First, the demo computes Q(x) of crops of photographs and prints its speed. Then a small classifier learns by
discrete adversarial training (preset easyrobust) which photograph a crop comes from. Last, one crop of each
photograph is attacked with this classifier.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat_client import Client, DatError
from dat_client.torch import AdversarialLoader
from picture import Pictures, Rows, draw
from training.data import PHOTOGRAPHS, photograph
from training.loop import rate
from training.networks import normalised
from training.progress import Progress
from training.run import one_line
from training.service import service

SIDE = 224
SMALL = 48  # side of the crops that train the classifier
BATCH = 16
ALPHA = 0.1


def crops(each: int = 4) -> Pictures:
    """Returns crops along the diagonals of the photographs inside scikit-image, uint8 [N,3,224,224]."""
    cropped = []
    for name in PHOTOGRAPHS:
        picture = photograph(name, round(1.3 * SIDE)).numpy()
        room = np.array(picture.shape[1:]) - SIDE
        for i in range(each):
            top, left = (room * i / max(1, each - 1)).astype(int)
            cropped.append(picture[:, top : top + SIDE, left : left + SIDE])
    return np.stack(cropped)


def psnr_db(x: Pictures, y: Pictures) -> npt.NDArray[np.float64]:
    """Returns the PSNR in dB of each image, with peak 255."""
    mse = ((x.astype(np.float64) - y) ** 2).reshape(len(x), -1).mean(1)
    values: npt.NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(mse, 1e-10))
    return values


def small_crops(number: int, generator: torch.Generator, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """Returns crops uint8 [N,3,48,48] and labels [N]. Only held-out crops show the right third of a photograph."""
    pictures, labels = [], torch.arange(number) % len(PHOTOGRAPHS)
    for label in labels.tolist():
        whole = photograph(PHOTOGRAPHS[label], 3 * SMALL)
        border = whole.shape[2] * 2 // 3
        part = whole[:, :, border:] if held_out else whole[:, :, :border]
        top, left = (int(torch.randint(extent - SMALL + 1, (), generator=generator)) for extent in part.shape[1:])
        pictures.append(part[:, top : top + SMALL, left : left + SMALL])
    return torch.stack(pictures), labels


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields training batches of 16 crops and labels, always the same."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        pictures, labels = small_crops(BATCH * 4, generator, held_out=False)
        drawn = torch.randperm(len(labels), generator=generator)[:BATCH]
        yield pictures[drawn], labels[drawn]


class Classifier(nn.Module):
    """Four convolutions, a mean over positions and a linear layer, for pictures in 0..1 of any size."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classes = nn.Linear(widths[-1], len(PHOTOGRAPHS))

    def forward(self, pictures: Tensor) -> Tensor:
        classes: Tensor = self.classes(self.features(normalised(pictures)).mean((2, 3)))
        return classes


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Returns the share of pictures that the model classifies correctly, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        correct = float((model(pictures).argmax(1) == labels).float().mean())
    model.train()
    return correct


def train(client: Client, steps: int) -> nn.Module:
    """Returns a classifier trained on the CPU by `steps` steps on L(x) + L(x_adv); prints its progress."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters())

    def loss_of(pictures: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(pictures), labels)

    held_out = small_crops(120, torch.Generator().manual_seed(2), held_out=True)
    loader = AdversarialLoader(
        batches(steps), client, loss_of, model=model, depth=1, preset="easyrobust", alpha=ALPHA
    )
    before = accuracy(model, *held_out)
    progress = Progress(0, steps, [])
    for batch in loader:
        optimizer.param_groups[0]["lr"] = 3e-3 * rate(progress.step, steps)
        optimizer.zero_grad()
        loss = loss_of(batch.images, *batch.rest) + loss_of(batch.adversarial, *batch.rest)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        beside = f"accuracy {accuracy(model, *held_out):.0%}"
        progress.count(loss.item(), beside, batch.tokens_changed, len(batch.images), batch.waited_s)
    progress.end_line()
    print(
        f"classifier: {progress.summary()}; accuracy on {len(held_out[1])} held-out crops "
        f"{before:.0%} -> {accuracy(model, *held_out):.0%}"
    )
    return model.eval()


def attacked(client: Client, model: nn.Module, x: Pictures, labels: Tensor) -> Rows:
    """Returns x, Q(x) and Q(x + δ), where δ is a step of L2 length α along the gradient at Q(x)."""
    x_hat = torch.from_numpy(client.discretize(x).reconstruction).float().div_(255).requires_grad_()
    (gradients,) = torch.autograd.grad(F.cross_entropy(model(x_hat), labels, reduction="sum"), x_hat)
    q = client.discretize(
        x,
        gradients=gradients.numpy(),
        # The step starts at x, not at Q(x), so that only δ makes a token differ from that of Q(x).
        base="x",
        normalize="l2",
        alpha=ALPHA,
        outputs=["reconstruction", "indices", "adversarial", "adversarial_indices"],
    )
    assert q.reconstruction is not None
    assert q.indices is not None
    assert q.adversarial is not None
    assert q.adversarial_indices is not None
    delta = ALPHA * F.normalize(gradients.flatten(1)).view_as(gradients)
    return Rows(x, q.reconstruction, q.indices, q.adversarial, delta.numpy(), q.adversarial_indices)


def discretized(client: Client, x: Pictures, rounds: int) -> None:
    """Sends all crops `rounds` times; prints the speed, the codec, the PSNR and the number of distinct tokens."""
    q = client.discretize(x, outputs=["reconstruction", "indices"])
    started = time.perf_counter()
    for number in range(1, rounds + 1):
        client.discretize(x)
        rate = number * len(x) / (time.perf_counter() - started)
        print(f"round {number}/{rounds}: {rate:.1f} images/s", flush=True)
    assert q.reconstruction is not None
    assert q.indices is not None
    facts = client.metadata()["parameters"]
    engine = f"{facts['engine']} {facts['dtype']} on {facts['device']}"
    print(f"codec {q.codec}, fingerprint {str(q.fingerprint)[:12]}, {engine}")
    psnr = psnr_db(x, q.reconstruction)
    used = len(np.unique(q.indices))
    print(
        f"{len(x)} crops of {len(PHOTOGRAPHS)} photographs, {SIDE} x {SIDE}: PSNR {psnr.mean():.2f} dB "
        f"(lowest {psnr.min():.2f}, highest {psnr.max():.2f}), {used} distinct tokens of {q.indices.size}",
        flush=True,
    )


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of a running service; by default, one is started and stopped")
    parser.add_argument("--codec", default="tiny-f8", help="codec of the service (default tiny-f8)")
    parser.add_argument("--local", action="store_true", help="start the service without Ray")
    parser.add_argument("--rounds", type=int, default=3, help="number of times the crops are sent (default 3)")
    parser.add_argument("--steps", type=int, default=32, help="training steps (default 32)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo.png"),
        help="file for the picture (default runs/demo.png)",
    )
    options = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the service computes on the same cores
    x = crops(each=4)
    labels = torch.arange(len(PHOTOGRAPHS))
    try:
        with (
            service(options.url, options.codec, local=options.local) as url,
            Client(url, options.codec) as client,
        ):
            discretized(client, x, options.rounds)
            model = train(client, options.steps)
            rows = attacked(client, model, x[1::4], labels)
    except DatError as error:
        sys.exit(f"demo: {one_line(error)}")
    changed = (rows.indices != rows.adversarial_indices).mean()
    print(f"attack with alpha {ALPHA:g}: {changed:.1%} of the tokens of {len(rows.x)} crops changed")
    draw(rows, options.out)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
