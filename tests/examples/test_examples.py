"""The training examples, run as a user runs them: as commands, against a service."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from dat_service.launch import running_service
from tests.conftest import DAT, ROOT, dat_serve

# Two processes compute side by side here: each keeps to half of a small machine, and lets go of it when it waits.
SHARING = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DAT_THREADS": "1"}

EXAMPLES = {
    "resnet50": ("classification.py",),
    "vit_b_16": ("classification.py", "--model", "vit_b_16"),
    "simsiam": ("simsiam.py",),
    "simclr": ("simclr.py",),
    "moco_v3": ("moco_v3.py",),
    "detection": ("detection.py",),
}
SUMMARY = re.compile(r"^loss (-?[\d.]+) -> (-?[\d.]+) in (\d+) steps, \d+ s$")


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """One tiny-f8 for all examples."""
    with dat_serve("--codec", "tiny-f8", "--local", env=SHARING) as (url, _):
        yield url


def command(example: str, *flags: object) -> list[str]:
    return [sys.executable, f"examples/{example}", *map(str, flags)]


def run(example: str, *flags: object, timeout: float = 170) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(example, *flags),
        cwd=ROOT,
        env=os.environ | SHARING,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def losses(done: subprocess.CompletedProcess[str]) -> tuple[float, float, int]:
    """The first loss, the last loss and the steps that an example's last line tells."""
    assert done.returncode == 0, done.stderr
    told = SUMMARY.match(done.stdout.strip().splitlines()[-1])
    assert told, done.stdout
    return float(told[1]), float(told[2]), int(told[3])


def readable(done: subprocess.CompletedProcess[str] | tuple[int, str], *words: str, status: int = 1) -> None:
    """Asserts that it ended with `status` and one line on stderr that has these words."""
    code, stderr = done if isinstance(done, tuple) else (done.returncode, done.stderr)
    assert code == status, stderr
    assert "Traceback" not in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    for word in words:
        assert word in stderr


@contextmanager
def begun(example: str, *flags: object) -> Iterator[subprocess.Popen[str]]:
    """A running example after its first line of progress; killed at the end if it is still there."""
    process = subprocess.Popen(
        command(example, *flags), cwd=ROOT, env=os.environ | SHARING, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("step "), line + process.communicate(timeout=30)[1]
        yield process
    finally:
        process.kill()
        process.communicate()


# One that classifies and one self-supervised tell on every change, `make test-examples` all.
@pytest.mark.parametrize(
    "example",
    [pytest.param(name, marks=[] if name in ("resnet50", "simsiam") else pytest.mark.slow) for name in EXAMPLES],
)
def test_loss_falls(service: str, example: str) -> None:
    first, last, _ = losses(run(*EXAMPLES[example], "--url", service))
    assert last < first - 0.2


@pytest.mark.slow
def test_no_arguments_at_all() -> None:
    """A service is started and stopped; here with few steps, whether the loss falls is told above."""
    done = run("simsiam.py", "--steps", "4")
    assert losses(done)[2] == 4
    assert done.stderr == ""


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=[] if name == "simsiam" else pytest.mark.slow) for name in EXAMPLES]
)
def test_killed_service_ends_it_readably(example: str) -> None:
    name, *flags = EXAMPLES[example]
    with (
        running_service("--codec", "tiny-f8", "--local", env=os.environ | SHARING) as service,
        begun(
            name,
            *flags,
            "--url",
            service.url,
            "--steps",
            1000,
            "--batch-size",
            4,
            "--timeout-s",
            5,
            "--outage-s",
            0,
        ) as process,
    ):
        os.killpg(service.pid, signal.SIGKILL)
        killed = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - killed < 30
    readable((process.returncode, stderr), urlsplit(service.url).netloc, "AdversarialLoader: batch ")


def test_without_the_service_package_a_url_is_needed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'examples'); sys.modules['dat_service'] = None;"
        "from training.service import service;"
        "print(service('http://codec:8000', 'tiny-f8').__enter__(), flush=True);"
        "service(None, 'tiny-f8').__enter__()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "http://codec:8000\n"
    readable(done, "pip install dat-service", "--url")


@pytest.mark.slow
def test_interrupt_saves_and_resume_goes_on(service: str, tmp_path: Path) -> None:
    out = tmp_path / "simsiam.pt"
    flags = ("--url", service, "--batch-size", 4, "--steps", 300, "--save-every", 3, "--out", out)
    with begun("simsiam.py", *flags) as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    readable((process.returncode, stderr), "stopped", status=130)
    reached = saved_step(out)
    assert 1 <= reached < 300
    with begun("simsiam.py", *flags, "--resume") as process:
        while saved_step(out) < reached + 3:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()  # no chance to save
    reached = saved_step(out)
    done = run("simsiam.py", *flags[:4], "--steps", reached + 2, "--out", out, "--resume")
    assert losses(done)[2] == reached + 2 == saved_step(out)
    assert done.stdout.startswith(f"step {reached + 1}/{reached + 2}, ")
    readable(run("simclr.py", "--url", service, "--out", out, "--resume"), str(out), "simsiam")
    assert run("simsiam.py", "--url", service, "--out", out).returncode == 2  # would overwrite it


def saved_step(path: Path) -> int:
    import torch

    return int(torch.load(path, weights_only=True)["step"])


def write_folder(folder: Path, *, size: tuple[int, int] = (72, 64)) -> None:
    """Two classes of eight pictures each, parts of photographs inside scikit-image."""
    from skimage import data

    for label, name in enumerate(("astronaut", "coffee")):
        (folder / name).mkdir(parents=True)
        picture = Image.fromarray(getattr(data, name)())
        for i in range(8):
            left, top = 20 * i, 25 * i + label
            picture.crop((left, top, left + size[0], top + size[1])).save(folder / name / f"{i}.jpg")


@pytest.mark.slow
def test_folder_with_reconstructions(service: str, tmp_path: Path) -> None:
    data, q = tmp_path / "data", tmp_path / "q"
    write_folder(data)
    flags = ("--url", service, "--model", "resnet18", "--batch-size", 8, "--image-size", 64)
    made = subprocess.run(
        [*DAT, "discretize", data, "--out", q],
        capture_output=True, text=True, env=os.environ | SHARING, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = run("classification.py", *flags, "--steps", 6, "--data", data, "--reconstructions", q)
    assert losses(done)[2] == 6
    (q / "coffee" / "3.png").unlink()
    missing = run("classification.py", *flags, "--steps", 6, "--data", data, "--reconstructions", q)
    readable(missing, str(q / "coffee" / "3.png"), str(data / "coffee" / "3.jpg"))


def test_pictures_and_their_reconstructions_get_the_same_crop() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import torch
        from torchvision.transforms import v2

        from training.data import same_crop
    finally:
        sys.path.pop(0)
    picture = torch.randint(0, 256, (3, 80, 90), dtype=torch.uint8)
    augment = v2.Compose([v2.RandomResizedCrop(32, antialias=True), v2.RandomHorizontalFlip()])
    for _ in range(8):
        x, q = same_crop(augment, picture, picture.clone())
        assert torch.equal(x, q)
        assert type(x) is torch.Tensor
    assert not torch.equal(x, same_crop(augment, picture, picture)[0])


def write_shard(path: Path) -> None:
    """Eight pictures with `cls` and the boxes of two patches each."""
    import webdataset
    from skimage import data

    picture = np.asarray(data.astronaut())
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(8):
            boxes = [[5 + i, 4, 30, 20], [40, 30, 16, 24], [0, 0, 0, 9]]
            objects = [{"bbox_xywh": box, "category_id": 1 + n, "iscrowd": 0} for n, box in enumerate(boxes)]
            objects.append({"bbox_xywh": [0, 0, 72, 64], "category_id": 4, "iscrowd": 1})
            crop = np.ascontiguousarray(picture[9 * i : 9 * i + 64, 9 * i : 9 * i + 72])
            sample = {"__key__": f"{i:04}", "jpg": crop, "cls": i % 2, "json": json.dumps({"objects": objects})}
            writer.write(sample)


@pytest.mark.slow
def test_shards(service: str, tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"train-{number:06}.tar")
    pattern = f"{tmp_path}/train-{{000000..000001}}.tar"
    flags = ("--url", service, "--data", pattern, "--batch-size", 4, "--steps", 3)
    done = run("classification.py", *flags, "--classes", 2, "--model", "resnet18", "--workers", 1, "--amp")
    assert losses(done)[2] == 3
    assert losses(run("detection.py", *flags, "--classes", 5, "--preset", "paper", "--depth", 0))[2] == 3
    readable(run("detection.py", *flags, "--classes", 3), "train-00000", "sample 000", "category_id")
    readable(run("simclr.py", "--url", service, "--data", pattern.replace("1}", "2}")), "train-000002.tar")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "/nowhere/at/all"), "/nowhere/at/all"),
        pytest.param(("--timeout-s", "2"), "127.0.0.1:9", marks=pytest.mark.slow),
        pytest.param(("--url", "127.0.0.1:9"), "url", marks=pytest.mark.slow),
        pytest.param(("--batch-size", "4000"), "--batch-size", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_said(flags: tuple[str, ...], words: str) -> None:
    readable(run("classification.py", "--model", "resnet18", "--url", "http://127.0.0.1:9", *flags), words)


@pytest.mark.slow
def test_two_processes_train_one_model(service: str, tmp_path: Path) -> None:
    out = tmp_path / "two.pt"
    flags = ["--url", service, "--model", "resnet18", "--steps", "4", "--batch-size", "4", "--out", str(out)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "examples/classification.py", *flags],
        cwd=ROOT, env=os.environ | SHARING, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert losses(done)[2] == 4
    assert saved_step(out) == 4


@pytest.mark.slow
def test_precomputed(service: str, tmp_path: Path) -> None:
    """Views that `dat precompute --augment 2` would store, with Q of the service that trains from them."""
    from dat_client import Client
    from dat_client.webdataset import view_of
    from tests.client.webdataset.precomputed import encoded, write_pair

    def augmented(number: int, x: Image.Image) -> dict[str, bytes]:
        views = [
            {"box": [8 * i, 4, 56, 60], "size": [48, 48], "flip": bool(i), "variant": 0, "seed": i} for i in (0, 1)
        ]
        made = {"views.json": json.dumps(views).encode()}
        for i, view in enumerate(views):
            crop = view_of(x, view)
            made[f"{i}.image.png"] = encoded(crop)
            pixels = np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))[None]
            q = client.discretize(pixels).reconstruction[0]
            made[f"{i}.png"] = encoded(Image.fromarray(q.transpose(1, 2, 0)))
        return made

    outputs = ["reconstruction", "image"]
    with Client(service, "tiny-f8") as client:
        names = [f"train-{i:06}.tar" for i in range(2)]
        src, dst = write_pair(
            tmp_path, names, 12, augmented, size=(72, 64), codec="tiny-f8", augment=2, outputs=outputs
        )
    flags = ("--url", service, "--data", dst, "--model", "resnet18", "--classes", 10, "--batch-size", 8)
    done = run(
        "precomputed.py", *flags, "--source", src, "--workers", 2, "--steps", 20, "--lr", 0.05, "--preset", "paper"
    )
    first, last, steps = losses(done)
    assert steps == 20
    assert last < first - 0.2
    assert "tokens changed" in done.stdout
    asked_nothing = run("precomputed.py", "--url", "http://127.0.0.1:9", *flags[2:], "--mix", 0, "--epochs", 2)
    assert losses(asked_nothing)[2] == 6
    readable(run("precomputed.py", *flags, "--codec", "identity"), "--codec identity", "tiny-f8")
    (dst / "manifest" / f"{names[0]}.json").unlink()
    two_of_one_shard = run("precomputed.py", *flags, "--source", src, "--workers", 2, "--steps", 2)
    assert losses(two_of_one_shard)[2] == 2
