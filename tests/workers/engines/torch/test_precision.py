"""The arithmetic that PyTorch sets for a whole process; the settings exist without a GPU, too."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest
import torch

from dat_workers.engines.torch import precision
from dat_workers.engines.torch.precision import arithmetic, fix_arithmetic

needs_new_flags = pytest.mark.skipif(
    not precision.HAS_FP32_PRECISION, reason="PyTorch before 2.9 has no fp32_precision"
)


ELSEWHERE = """
    import torch
    from torch import backends as b
    from dat_workers.codecs.networks.vqgan import VQGAN
    from dat_workers.codecs.spec import CodecSpec
    from dat_workers.engines.config import EngineConfig
    from dat_workers.engines.factory import create
    from dat_workers.engines.torch.precision import arithmetic

    matmul = b.cuda.matmul
    spec = CodecSpec("toy", ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), codebook_size=8,
                     latent_dim=4)

    def show(*more):
        print(b.cudnn.conv.fp32_precision, matmul.fp32_precision, b.cudnn.benchmark, b.cudnn.deterministic,
              matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction, *more)

    for elsewhere in (
        "b.fp32_precision = 'tf32'",
        "b.cudnn.fp32_precision = 'tf32'",
        "torch.set_float32_matmul_precision('medium')",
        "b.cudnn.benchmark = True; b.cudnn.deterministic = False",
    ):
        exec(elsewhere)
        create(EngineConfig(device="cpu"), VQGAN(spec))
        show(b.mkldnn.conv.fp32_precision, b.mkldnn.matmul.fp32_precision)
        exec(elsewhere)
        with arithmetic(tf32=False):
            show()
        with arithmetic(tf32=True):
            show()
"""


@needs_new_flags
def test_settings_elsewhere_in_the_process_do_not_reach_the_engine() -> None:
    """By default cuDNN computes fp32 convolutions in TF32; "none" would take the process's value."""
    command = [sys.executable, "-c", textwrap.dedent(ELSEWHERE)]  # a process of its own, because settings stay
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = ["ieee ieee False True False False ieee ieee", "ieee ieee False True False False"]
    assert done.stdout.splitlines() == 4 * [*expected, "tf32 tf32 False True False False"]


@needs_new_flags
def test_tf32_is_allowed_inside_and_not_after() -> None:
    fix_arithmetic()
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    with arithmetic(tf32=True):
        assert (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
        with arithmetic(tf32=False):
            assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
        assert (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
    assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
    with pytest.raises(ZeroDivisionError), arithmetic(tf32=True):
        raise ZeroDivisionError
    assert conv.fp32_precision == "ieee"


@needs_new_flags
def test_blocks_of_two_threads_do_not_interleave() -> None:
    """Without a lock the second block would save "tf32" as the value from before, and leave it behind."""
    fix_arithmetic()
    inside, leave, entered = threading.Event(), threading.Event(), threading.Event()
    read: list[str] = []

    def second() -> None:
        assert inside.wait(30)
        with arithmetic(tf32=False):
            entered.set()
            read.append(torch.backends.cudnn.conv.fp32_precision)

    thread = threading.Thread(target=second)
    thread.start()
    with arithmetic(tf32=True):
        inside.set()
        assert not entered.wait(0.3)
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        leave.set()
    thread.join(30)
    assert read == ["ieee"]
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_old_pytorch_gets_the_old_flags_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = SimpleNamespace(allow_tf32=True, benchmark=True, deterministic=False)
    matmul = SimpleNamespace(
        allow_tf32=True,
        allow_fp16_reduced_precision_reduction=True,
        allow_bf16_reduced_precision_reduction=True,
    )
    backends = SimpleNamespace(cudnn=cudnn, cuda=SimpleNamespace(matmul=matmul))
    monkeypatch.setattr(torch, "backends", backends)
    monkeypatch.setattr(precision, "HAS_FP32_PRECISION", False)
    fix_arithmetic()
    assert vars(cudnn) == {"allow_tf32": False, "benchmark": False, "deterministic": True}
    assert set(vars(matmul).values()) == {False}
    with arithmetic(tf32=True):
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, True)
    assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
