"""The main job, whole: start the service, discretize photographs through the client, draw what came back.

make demo                                            # on Ray Serve
python examples/demo.py --local                      # one process, without Ray
python examples/demo.py --url http://codec:8000      # against a service that runs already
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dat_client import Client

Pictures = npt.NDArray[np.uint8]

SIDE = 224
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "retina")


def photographs(crops_each: int = 4) -> Pictures:
    """uint8 [N,3,224,224]: crops along the diagonal of the photographs inside scikit-image."""
    from skimage import data

    crops = []
    for name in PHOTOGRAPHS:
        loaded: Any = getattr(data, name)()
        picture = Image.fromarray(loaded[0] if isinstance(loaded, tuple) else loaded)
        scale = 1.3 * SIDE / min(picture.size)
        small = np.asarray(picture.resize((round(picture.width * scale), round(picture.height * scale))))
        room = np.array(small.shape[:2]) - SIDE
        for i in range(crops_each):
            top, left = (room * i / max(1, crops_each - 1)).astype(int)
            crops.append(small[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1))
    return np.stack(crops)


def psnr_db(x: Pictures, y: Pictures) -> npt.NDArray[np.float64]:
    """PSNR in dB of each image, peak 255."""
    mse = ((x.astype(np.float64) - y) ** 2).reshape(len(x), -1).mean(1)
    values: npt.NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(mse, 1e-10))
    return values


@contextmanager
def service(arguments: argparse.Namespace) -> Iterator[str]:
    """The address of a running service: the given one, or one that is started here and stopped at the end."""
    if arguments.url:
        yield arguments.url
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "dat_service.cli",
        "serve",
        "--codec",
        arguments.codec,
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command + (["--local"] if arguments.local else []), start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        with Client(url, arguments.codec) as client:
            deadline = time.monotonic() + 180
            while not client.ready():
                if process.poll() is not None:
                    sys.exit(f"the service ended with status {process.returncode}")
                if time.monotonic() > deadline:
                    sys.exit("the service was not ready within 180 s")
                time.sleep(0.2)
        yield url
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def colours(indices: npt.NDArray[np.uint16]) -> Pictures:
    """Tokens [h,w] as a picture uint8 [3,h,w], each token a colour of its own."""
    mixed = indices.astype(np.uint32) * np.uint32(2654435761)
    return np.stack([(mixed >> shift) & 255 for shift in (8, 16, 24)]).astype(np.uint8)


def draw(x: Pictures, q: Pictures, indices: npt.NDArray[np.uint16], path: Path) -> None:
    """One row a photograph: original, reconstruction, difference x 4, token map."""
    titles = ("x", "Q(x)", "|x - Q(x)| x 4", f"tokens, {indices.shape[1]} x {indices.shape[2]}")
    head, gap = 20, 4
    sheet = Image.new("RGB", (4 * (SIDE + gap), head + len(x) * (SIDE + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (SIDE + gap) + 4, 4), title, fill="black")
    for row in range(len(x)):
        difference = np.abs(x[row].astype(int) - q[row]) * 4
        cells = (x[row], q[row], difference.clip(0, 255).astype(np.uint8), colours(indices[row]))
        for column, cell in enumerate(cells):
            tile = Image.fromarray(np.ascontiguousarray(cell.transpose(1, 2, 0)))
            tile = tile.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * (SIDE + gap), head + row * (SIDE + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running service; without it one is started and stopped")
    parser.add_argument("--codec", default="tiny-f8")
    parser.add_argument("--local", action="store_true", help="start the service without Ray")
    parser.add_argument("--rounds", type=int, default=3, help="times the batch is sent (default 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo.png"), help="the picture (default runs/demo.png)"
    )
    arguments = parser.parse_args()
    x = photographs()
    with service(arguments) as url, Client(url, arguments.codec) as client:
        q = client.discretize(x, outputs=["reconstruction", "indices"])
        started = time.perf_counter()
        for round_number in range(1, arguments.rounds + 1):
            client.discretize(x)
            rate = round_number * len(x) / (time.perf_counter() - started)
            print(f"round {round_number}/{arguments.rounds}: {rate:.1f} images/s", flush=True)
        assert q.reconstruction is not None
        assert q.indices is not None
        facts = client.metadata()["parameters"]
        how = f"{facts['engine']} {facts['dtype']} on {facts['device']}"
        print(f"codec {q.codec}, fingerprint {str(q.fingerprint)[:12]}, {how}")
    psnr = psnr_db(x, q.reconstruction)
    used = len(np.unique(q.indices))
    print(
        f"{len(x)} crops of {len(PHOTOGRAPHS)} photographs, {SIDE} x {SIDE}: PSNR {psnr.mean():.2f} dB "
        f"(lowest {psnr.min():.2f}, highest {psnr.max():.2f}), {used} distinct tokens of {q.indices.size}"
    )
    shown = slice(1, None, len(x) // len(PHOTOGRAPHS))
    draw(x[shown], q.reconstruction[shown], q.indices[shown], arguments.out)
    print(f"picture: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
