"""`dat serve` as a process: it starts or reports why not, and leaves nothing behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from dat_client import Client
from dat_service.processes import descendants, runs
from tests.conftest import DAT, dat_serve, free_port
from tests.e2e.test_ray_faults import install as install_toy


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_local_service_ends_well(end: signal.Signals) -> None:
    with dat_serve("--codec", "identity", "--local") as (_, process):
        os.kill(process.pid, end)
        assert process.wait(30) == 0


@pytest.mark.filterwarnings("ignore::dat_client.CodecChanged")
def test_local_service_loads_its_codec_again(tmp_path: Path) -> None:
    """SIGHUP loads the codec again, and no request fails meanwhile. One that cannot be loaded changes nothing."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    fingerprints = [install_toy(tmp_path, seed) for seed in (1, 0)]
    env = {"DAT_HOME": str(tmp_path)}
    with dat_serve("--codec", "toy", "--local", "--threads", "1", env=env) as (url, process):
        with Client(url, "toy", retries=0) as client:
            before = client.discretize(images)
            install_toy(tmp_path, 1)
            process.send_signal(signal.SIGHUP)
            answers = [before]
            deadline = time.monotonic() + 120
            while answers[-1].fingerprint != fingerprints[0]:
                assert time.monotonic() < deadline
                answers.append(client.discretize(images))
            assert {a.fingerprint for a in answers} == set(fingerprints)
            assert not np.array_equal(answers[-1].reconstruction, before.reconstruction)
            for file in tmp_path.rglob("*.safetensors"):
                file.write_bytes(b"damaged")
            process.send_signal(signal.SIGHUP)
            time.sleep(2)
            assert np.array_equal(client.discretize(images).reconstruction, answers[-1].reconstruction)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_body_that_arrives_during_an_update_is_answered() -> None:
    entry = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 1, 1], "data": [1, 2, 3]}
    body = json.dumps({"inputs": [entry]}).encode()
    head = f"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with dat_serve("--codec", "identity", "--local") as (url, process):
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as connection:
            connection.sendall(head + body[:10])
            time.sleep(0.5)
            process.send_signal(signal.SIGHUP)
            time.sleep(2)
            connection.sendall(body[10:])
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert (response.status, json.loads(response.read())["outputs"][0]["data"]) == (200, [1, 2, 3])


def test_local_service_survives_hangups_in_every_phase() -> None:
    """SIGHUPs arrive every 50 ms from the first line of the command to its end; each is at most one update."""
    process = subprocess.Popen(
        [*DAT, "serve", "--codec", "identity", "--local", "--port", str(free_port())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip

    def hang_up() -> None:
        while process.poll() is None:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.05)

    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("loading"):
                threading.Thread(target=hang_up, daemon=True).start()
            if line.startswith("updated") and "stopping" not in lines:
                process.send_signal(signal.SIGTERM)
                lines.append("stopping")
        assert process.wait(60) == 0, lines
    finally:
        process.kill()
        process.communicate()
    assert any(line.startswith("ready") for line in lines)
    assert lines[-1] == "stopped\n"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_running(end: signal.Signals) -> None:
    with dat_serve("--codec", "identity") as (url, process):
        with Client(url, "identity") as client:
            assert client.ready()
        begun = descendants(psutil.Process(process.pid).children())
        assert len(begun) > 3  # Ray's own, the replica, HAProxy
        assert "haproxy" in {p.name() for p in begun}
        os.kill(process.pid, end)
        assert process.wait(60) == 0
        deadline = time.monotonic() + 20
        while left := set(filter(runs, begun)):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0


def test_two_services_side_by_side(ray_url: str) -> None:
    """Replica ports are opened with SO_REUSEPORT, so two services with the same ports would mix up requests."""
    with dat_serve("--codec", "identity") as (url, _):
        for _ in range(20):
            with Client(url, "identity") as one, Client(ray_url, "tiny-f8") as other:
                assert one.metadata()["name"] == "identity"
                assert other.metadata()["name"] == "tiny-f8"


def failing(*arguments: str, env: dict[str, str] | None = None) -> str:
    finished = subprocess.run(
        [*DAT, "serve", *arguments], capture_output=True, text=True, timeout=120, env=os.environ | (env or {})
    )
    assert finished.returncode == 1, finished.stdout
    assert "Traceback" not in finished.stderr
    said = [line for line in finished.stderr.splitlines() if line.startswith("dat serve: ")]
    assert len(said) == 1, finished.stderr
    return said[0]


@pytest.mark.parametrize("local", [[], ["--local"]])
def test_what_cannot_start_says_why(local: list[str], tmp_path: Path) -> None:
    assert "did you mean tiny-f8" in failing("--codec", "tiny-f9", *local)
    assert "dat codecs pull vqgan-openimages-f8-16384" in failing("--codec", "vqgan-openimages-f8-16384", *local)
    assert "99999" in failing("--port", "99999", *local)
    assert "onyx" in failing("--engine", "onyx", *local)
    assert "warp" in failing("--tricks", "all,-warp", *local)
    empty = tmp_path / "keys"
    empty.write_text("\n")
    assert str(empty) in failing("--api-key-file", str(empty), *local)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        assert str(port) in failing("--port", str(port), *local)


@pytest.mark.parametrize("local", [[], ["--local"]])
def test_codec_that_does_not_load_in_the_replica_ends_the_command(local: list[str]) -> None:
    """Whether engine and dtype fit is only known when the codec is loaded, in the replica's process."""
    said = failing("--engine", "reference", "--dtype", "bf16", "--port", str(free_port()), *local)
    assert "'bf16', but must be auto or fp32 for the engine 'reference'" in said


@pytest.mark.parametrize("local", [[], ["--local"]])
def test_device_that_is_not_there(local: list[str]) -> None:
    assert "cuda:77" in failing("--device", "cuda:77", "--port", str(free_port()), *local)


def test_settings_from_variables() -> None:
    with dat_serve("--local", env={"DAT_CODEC": "identity", "DAT_MAX_IMAGES": "3"}) as (url, _):
        from dat_client import TooLarge

        with Client(url, "identity") as client, pytest.raises(TooLarge, match="3 images"):
            client.discretize(np.zeros((4, 3, 8, 8), np.uint8))
    assert "max_images" in failing("--local", env={"DAT_MAX_IMAGES": "none"})
    assert "DAT_MAX_IMAGSE" in failing("--local", env={"DAT_MAX_IMAGSE": "3"})
