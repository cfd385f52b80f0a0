from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dat_client import Client, InvalidRequest
from dat_client.torch import AdversarialLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's own imports warn
    pl = pytest.importorskip("pytorch_lightning")
    from dat_client.integrations.lightning import DiscreteAdversarialTraining

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


class Classifier(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []
        self.shares: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = (batch.adversarial, batch.rest[0]) if hasattr(batch, "adversarial") else batch
        self.seen.append(images)
        return F.cross_entropy(self(images), labels)

    def on_train_batch_end(self, *_: Any) -> None:
        if "tokens_changed" in self.trainer.callback_metrics:
            self.shares.append(float(self.trainer.callback_metrics["tokens_changed"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: nn.Module, data: Any, callbacks: list[Any]) -> Classifier:
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, log_every_n_steps=1,
    )  # fmt: skip
    classifier = Classifier(module)
    trainer.fit(classifier, data)
    return classifier


def attack(module: Any, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(module(images), labels)


def test_the_callback_trains_on_adversarial_pictures(
    codec: Client, model: nn.Module, x: Tensor, labels: Tensor
) -> None:
    data = DataLoader(TensorDataset(x, labels), batch_size=2)
    callback = DiscreteAdversarialTraining(codec, attack, preset="easyrobust", alpha=0.4)
    classifier = fit(model, data, [callback])
    assert len(classifier.seen) == 2
    assert all(seen.dtype == torch.float32 for seen in classifier.seen)
    assert not torch.equal(classifier.seen[0], x[:2] / 255)
    assert max(classifier.shares) > 0


def test_batches_that_cannot_be_changed_are_refused(codec: Client, model: nn.Module, x: Tensor) -> None:
    callback = DiscreteAdversarialTraining(codec, attack)
    data = DataLoader([{"images": x}], batch_size=None)
    with pytest.raises(InvalidRequest, match="must be a list"):
        fit(model, data, [callback])


def test_the_loader_serves_lightning_as_it_is(codec: Client, model: nn.Module, x: Tensor, labels: Tensor) -> None:
    data = DataLoader(TensorDataset(x, labels), batch_size=2)
    classifier = fit(
        model,
        AdversarialLoader(data, codec, lambda i, y: F.cross_entropy(model(i), y), model=model, depth=1),
        [],
    )
    assert len(classifier.seen) == 2
