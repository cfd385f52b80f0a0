"""`dat precompute` under SIGKILL at random moments: it always ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.workers.precompute.shards import contents, write_shards

KILLS = int(os.environ.get("DAT_KILLS", "20"))
SHARDS, SAMPLES, SIDE = 10, 40, 96

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def command(source: Path, dst: Path, *options: str) -> list[str]:
    dat = [sys.executable, "-m", "dat_service.cli", "precompute", str(source), str(dst)]
    return [*dat, "--threads", "1", "--outputs", "reconstruction,indices", *options]


def start(source: Path, dst: Path, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command(source, dst, *options), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def finish(job: subprocess.Popen[str]) -> str:
    out, _ = job.communicate(timeout=600)
    assert job.returncode == 0, out
    return out


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::Worker" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def all_gone(processes: list[psutil.Process], within_s: float = 60) -> None:
    """Asserts that the processes which a job had started end with it."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert not alive


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("source"), SHARDS, SAMPLES, SIDE)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    dst = tmp_path_factory.mktemp("undisturbed") / "dst"
    finish(start(source, dst))
    return contents(dst)


@pytest.mark.parametrize("options", [[], ["--ray"]], ids=["local", "ray"])
@pytest.mark.parametrize("workers", ["1", "3"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, workers: str, options: list[str]
) -> None:
    how = [*options, "--workers", workers]
    began = time.monotonic()
    finish(start(source, tmp_path / "first", *how))
    takes_s = time.monotonic() - began
    assert contents(tmp_path / "first") == undisturbed
    draw = random.Random(f"{workers} {options}")
    kills, folders, cut = 0, 0, 0
    left: list[psutil.Process] = []
    while kills < KILLS:
        dst = tmp_path / f"dst-{folders}"
        folders += 1
        while kills < KILLS:
            job = start(source, dst, *how)
            try:
                job.wait(draw.uniform(0.2, 1.0) * takes_s)
            except subprocess.TimeoutExpired:
                left += (started := family(job.pid))
                workers_of_it = [process for process in started if is_worker(process)]
                job.kill()
                job.communicate()
                all_gone(workers_of_it)
                kills += 1
                cut += bool(list(dst.glob(".precompute-*")))
                continue
            assert job.returncode == 0, finish(job)
            job.communicate()
            break
        finish(start(source, dst, *how))
        assert contents(dst) == undisturbed
    print(f"\n{' '.join(how)}: {kills} kills, {cut} within the work, {folders} folders, {takes_s:.1f} s each")
    all_gone(left, within_s=180)  # Ray's own agents look for a minute for a Ray that was killed
    assert cut > KILLS // 4


def test_a_worker_that_is_killed_is_replaced_and_its_shards_made_again(
    source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    job = start(source, dst, "--ray", "--workers", "3")
    killed: set[int] = set()
    draw = random.Random(0)
    while job.poll() is None and len(killed) < 3:
        finished = len(list(dst.glob("*.tar")))
        if finished > 2 * len(killed):
            workers = [p for p in family(job.pid) if is_worker(p) and p.pid not in killed]
            if workers:
                victim = draw.choice(workers)
                killed.add(victim.pid)
                victim.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    out = finish(job)
    print(f"\n{len(killed)} workers killed\n{out}")
    assert killed
    assert "times a worker ended" in out
    assert contents(dst) == undisturbed


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [[], ["--ray"]], ids=["local", "ray"])
def test_a_stopped_job_leaves_whole_shards_and_continues(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, sent: signal.Signals, options: list[str]
) -> None:
    dst = tmp_path / "dst"
    job = start(source, dst, *options)
    while not list(dst.glob("*.tar")):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    started = family(job.pid)
    job.send_signal(sent)
    out, _ = job.communicate(timeout=120)
    assert (job.returncode, out.splitlines()[-1]) == (
        130,
        "dat precompute: interrupted; the same command continues where this run stopped",
    )
    all_gone(started)
    left = contents(dst)
    assert 0 < len([name for name in left if name.endswith(".tar")]) < SHARDS
    assert not [name for name in left if ".precompute-" in name]
    assert "shards were there" in finish(start(source, dst, *options))
    assert contents(dst) == undisturbed
