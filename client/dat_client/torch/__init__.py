"""Discrete adversarial training in a PyTorch loop; the codec stays on the server.

    from dat_client.torch import AdversarialLoader

    def attack(images, labels):                       # images in 0..1; normalise in here or in the model
        return F.cross_entropy(model(images), labels)

    for batch in AdversarialLoader(loader, client, attack, model=model, depth=1):
        (labels,) = batch.rest
        loss = F.cross_entropy(model(batch.adversarial), labels)
        ...

`straight_through` is Q as a differentiable function (Eq. 7); `adversarial` is lines 3-5 of Algorithm 1 for one
batch; `AdversarialLoader` does them for a whole data loader and hides the codec's time behind the training steps.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("dat_client.torch needs PyTorch: pip install 'dat-client[torch]'") from error

from dat_client.torch._adversarial import Adversarial, adversarial
from dat_client.torch._loader import AdversarialBatch, AdversarialLoader
from dat_client.torch._straight_through import straight_through

__all__ = ["Adversarial", "AdversarialBatch", "AdversarialLoader", "adversarial", "straight_through"]
