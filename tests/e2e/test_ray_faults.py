"""A service on Ray survives updates and dying processes under load; the requests are raw and never repeated.

Slow: `python -m pytest -m slow tests/e2e/test_ray_faults.py`
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dat_service.processes import descendants, runs
from dat_workers.codecs.file import Origin
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.store import CodecStore
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from tests.conftest import dat_serve
from tests.e2e.request_threads import Load, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

IMAGES = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
Service = tuple[str, subprocess.Popen[str]]


def install(home: Path, seed: int) -> str:
    """Replaces the codec by a small random one, and returns its fingerprint."""
    torch.manual_seed(seed)
    spec = CodecSpec("toy", ch=32, ch_mult=(1, 1), codebook_size=64, latent_dim=4)
    return CodecStore(home).add(spec, VQGAN(spec).state_dict(), Origin("test", "", ""), replace=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    install(folder, 0)
    return folder


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Service]:
    with dat_serve("--codec", "toy", "--replicas", "2", env={"DAT_HOME": str(home)}) as (url, process):
        yield url, process


def until(check: Callable[[], bool], patience_s: float = 300) -> float:
    """Waits until the check is true, and returns the seconds that it took."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() < began + patience_s
        time.sleep(0.1)
    return time.monotonic() - began


def ours(service: Service, name: str) -> set[psutil.Process]:
    """Returns the service's processes whose command begins with `name`."""
    found = set()
    for process in descendants(psutil.Process(service[1].pid).children()):
        with contextlib.suppress(psutil.Error, IndexError):  # it has just ended
            if process.cmdline()[0].rpartition("/")[2].startswith(name):
                found.add(process)
    return found


def answers_again(traffic: Load, since: float) -> bool:
    """Whether all requests of the last second succeeded."""
    now = time.monotonic()
    lately = [outcome for when, outcome, _, _ in list(traffic.results) if when > max(since, now - 1)]
    return now > since + 1 and len(lately) > 3 and set(lately) == {"200"}


def check_answers(traffic: Load) -> None:
    """Each fingerprint has exactly one answer."""
    by_codec: dict[str, set[bytes]] = {}
    for _, outcome, fingerprint, pictures in traffic.results:
        if outcome == "200":
            by_codec.setdefault(fingerprint, set()).add(pictures)
    assert all(len(pictures) == 1 for pictures in by_codec.values())


def test_updates_fail_no_request(
    service: Service, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, process = service
    fingerprints = []
    with load(url, "toy", IMAGES) as traffic:
        until(lambda: len(traffic.results) > 10)
        for seed in range(1, 5):
            fingerprints.append(install(home, seed))
            process.send_signal(signal.SIGHUP)

            def all_new() -> bool:
                now = time.monotonic()
                lately = {f for when, _, f, _ in list(traffic.results) if when > now - 3}
                return lately == {fingerprints[-1]}

            until(all_new)
    with capsys.disabled():
        print(f"\n4 updates of 2 replicas: {len(traffic.results)} requests, {len(traffic.failures)} failed")
    assert traffic.failures == []
    check_answers(traffic)
    assert {f for _, _, f, _ in traffic.results} >= set(fingerprints)
    monkeypatch.setenv("DAT_HOME", str(home))
    expected = Discretizer.from_store("toy", EngineConfig(device="cpu")).discretize(IMAGES)
    last = np.frombuffer(traffic.results[-1][3], np.uint8).reshape(IMAGES.shape)
    assert np.abs(last.astype(int) - expected["reconstruction"]).mean() < 0.1


@pytest.mark.parametrize("name", ["ray::ServeReplica", "haproxy", "ray::HAProxyManager", "ray::ServeController"])
def test_killed(service: Service, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests in flight may fail; soon the service works as before, by itself."""
    url, _ = service
    victims = ours(service, name)
    assert victims
    victim = min(victims, key=lambda p: p.pid)
    count = len(ours(service, "ray::ServeReplica"))
    with load(url, "toy", IMAGES) as traffic:
        until(lambda: len(traffic.results) > 10)
        before = len(traffic.failures)
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: answers_again(traffic, killed))
        bad = [when for when, outcome, _, _ in traffic.results if outcome != "200" and when > killed]
        until(lambda: len(set(filter(runs, ours(service, name))) - {victim}) >= len(victims))
        until(lambda: len(ours(service, "ray::ServeReplica")) == count)
        until(lambda: answers_again(traffic, time.monotonic() - 2))
    with capsys.disabled():
        print(f"\n{name} killed: {len(bad)} of {len(traffic.results)} requests failed, the last ", end="")
        print(f"{max(bad) - killed:.1f} s after" if bad else "never")
    assert before == 0
    check_answers(traffic)


def test_controller_that_came_back_still_updates(service: Service, home: Path) -> None:
    url, process = service
    fingerprint = install(home, 9)
    process.send_signal(signal.SIGHUP)
    with load(url, "toy", IMAGES, threads=1) as traffic:
        until(lambda: bool(traffic.results) and traffic.results[-1][2] == fingerprint)
    assert traffic.failures == []


def test_replica_that_hangs_is_replaced(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """A stopped process answers no health check, like one that is stuck in native code."""
    url, _ = service
    replicas = ours(service, "ray::ServeReplica")
    victim = min(replicas, key=lambda p: p.pid)
    with load(url, "toy", IMAGES) as traffic:
        until(lambda: len(traffic.results) > 10)
        os.kill(victim.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        replaced = until(lambda: not runs(victim) and len(ours(service, "ray::ServeReplica")) == len(replicas))
        until(lambda: answers_again(traffic, time.monotonic() - 2))
    bad = [when - stopped for when, outcome, _, _ in traffic.results if outcome != "200"]
    with capsys.disabled():
        print(f"\nhung: {len(bad)} of {len(traffic.results)} failed, at {max(bad, default=0):.1f} s; ", end="")
        print(f"replaced after {replaced:.0f} s")
    assert len(bad) <= 4  # those that were with it; all others found the other replica
    check_answers(traffic)
