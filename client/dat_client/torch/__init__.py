"""Functions for discrete adversarial training in a PyTorch loop, with the codec on a server.

    from dat_client.torch import AdversarialLoader

    def attack(images, labels):                       # images in 0..1; normalise in here or in the model
        return F.cross_entropy(model(images), labels)

    for batch in AdversarialLoader(loader, client, attack, model=model, depth=1):
        (labels,) = batch.rest
        loss = F.cross_entropy(model(batch.adversarial), labels)
        ...

`straight_through` computes Q as a differentiable function (Eq. 7). `adversarial` computes lines 3-5 of Algorithm 1
for one batch. `AdversarialLoader` computes them for every batch of a data loader, while the model trains on earlier
batches.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("dat_client.torch needs PyTorch: pip install 'dat-client[torch]'") from error

from dat_client.torch._adversarial import Adversarial, adversarial
from dat_client.torch._loader import AdversarialBatch, AdversarialLoader
from dat_client.torch._straight_through import straight_through

__all__ = ["Adversarial", "AdversarialBatch", "AdversarialLoader", "adversarial", "straight_through"]
