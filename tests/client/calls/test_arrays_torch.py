from __future__ import annotations

import numpy as np
import pytest

from dat_client import InvalidRequest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_torch_in_is_torch_out(client, images, dtype):
    tensor = torch.from_numpy(images)
    tensor = tensor if dtype == torch.uint8 else (tensor / 255).to(dtype)
    q = client.discretize(tensor, outputs=["reconstruction", "indices"])
    assert isinstance(q.reconstruction, torch.Tensor)
    assert q.reconstruction.dtype == dtype
    assert torch.equal(q.reconstruction, tensor)
    assert q.reconstruction.device == tensor.device
    assert q.indices.dtype == torch.int64
    q.reconstruction.add_(1)  # writable, on its own memory


def test_strided_and_differentiable_tensors(client, images):
    tensor = (torch.from_numpy(images) / 255).to(memory_format=torch.channels_last).requires_grad_()
    reconstruction = client.submit(tensor).result(20).reconstruction
    assert torch.equal(reconstruction, tensor.detach())
    assert not reconstruction.requires_grad


def test_decode_gives_torch_for_torch(client):
    pictures = client.decode(torch.arange(4).reshape(1, 2, 2))
    assert isinstance(pictures, torch.Tensor)
    assert pictures[0, 0, ::8, ::8].tolist() == [[0, 1], [2, 3]]


def test_answers_go_back_to_the_device(monkeypatch):
    from dat_client.calls.arrays import Kind

    restored = Kind(torch, torch.device("meta")).restore(np.zeros((1, 3, 2, 2), np.uint8))
    assert restored.device.type == "meta"


def test_read_only_and_unaligned_answers_are_copied():
    from dat_client.calls.arrays import Kind

    array = np.frombuffer(b"x" + np.arange(6, dtype=np.float32).tobytes(), np.uint8)[1:].view(np.float32)
    assert not array.flags.writeable
    restored = Kind(torch, torch.device("cpu")).restore(array)
    assert restored.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_cannot_travel(client, dtype):
    with pytest.raises(InvalidRequest, match=r"\.float\(\)"):
        client.discretize(torch.zeros(1, 3, 8, 8, dtype=dtype))
