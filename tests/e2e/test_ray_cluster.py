"""`dat serve` on a Ray that was started before, and its configuration for `serve run` and `serve deploy`.

Slow: `python -m pytest -m slow tests/e2e/test_ray_cluster.py`
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dat_client import Client, DatError, UnknownCodec
from dat_service.ports import take_block
from dat_service.ray import haproxy
from tests.conftest import DAT, dat_serve, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
IMAGES = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Starts a separate Ray with the documented variables, which everything that joins it needs too."""
    folder = Path(tempfile.mkdtemp(prefix="dat-ray-"))  # not pytest's: a socket's path is at most 107 bytes
    port, serve_port = free_port(), free_port()
    block = take_block(serve_port)
    environment = os.environ | haproxy.environment(folder, "127.0.0.1", serve_port, block.getsockname()[1] + 1, ())
    # what joins a cluster has to know its token, which is Ray's default
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [
            BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}/ray",
            f"--port={port}", f"--ray-client-server-port={free_port()}", f"--dashboard-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=8", "--num-gpus=0",
            "--object-store-memory=200000000",
        ],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "--block" in line:  # "This command will now block ..."
            break
    else:
        pytest.fail("ray start ended")
    try:
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}", "SERVE_PORT": str(serve_port)}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        block.close()
        shutil.rmtree(folder, ignore_errors=True)


def check(url: str, codec: str) -> None:
    with Client(url, codec, timeout_s=120) as client:
        q = client.discretize(IMAGES)
        assert q.reconstruction is not None
        assert q.reconstruction.shape == IMAGES.shape
        if codec == "identity":
            assert np.array_equal(q.reconstruction, IMAGES)


def test_beside_what_serve_runs(cluster: dict[str, str], tmp_path: Path) -> None:
    port = cluster["SERVE_PORT"]
    url = f"http://127.0.0.1:{port}"
    path = tmp_path / "serve.yaml"
    options = ["--codec", "identity", "--port", port, "--device", "cpu"]
    subprocess.run([*DAT, "serve", *options, "--serve-config", path], check=True)
    run = [BIN / "serve", "run", "--non-blocking", path]
    finished = subprocess.run(run, env=cluster, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    deadline = time.monotonic() + 300
    while True:
        try:
            check(url, "identity")
            break
        except DatError:
            assert time.monotonic() < deadline
            time.sleep(1)

    # another port is asked for; Serve listens where it did
    with dat_serve("--codec", "tiny-f8", env=cluster) as (_, process):
        check(f"{url}/tiny-f8", "tiny-f8")
        check(url, "identity")
        again = subprocess.run([*DAT, "serve"], env=cluster, capture_output=True, text=True, timeout=120)
        assert again.returncode == 1
        assert "tiny-f8 is already served on this cluster" in again.stderr
        check(f"{url}/tiny-f8", "tiny-f8")
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    check(url, "identity")
    with Client(f"{url}/tiny-f8", "tiny-f8", timeout_s=2) as client, pytest.raises(UnknownCodec):
        client.ready()

    # and again, now that it is gone
    with dat_serve("--codec", "tiny-f8", env=cluster):
        check(f"{url}/tiny-f8", "tiny-f8")
