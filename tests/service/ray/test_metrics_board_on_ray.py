"""The metrics board as a real Ray actor; run it by `python -m tests.service.ray.test_metrics_board_on_ray`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from dat_service.ray.metrics_board import NAMESPACE, SharedMetrics
from tests.conftest import ROOT
from tests.service.observability.test_metrics import Samples, busy, parsed


@pytest.mark.slow
def test_any_replica_answers_for_all() -> None:
    done = subprocess.run(
        [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=240, cwd=ROOT,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "made again" in done.stdout


def when(shared: SharedMetrics, expected: set[str]) -> Samples:
    """Scrapes until exactly these replicas are shown, and returns the samples."""

    async def ask() -> Samples:
        for _ in range(600):
            _, samples = parsed(await shared.families())
            if {replica for _, replica in samples} == expected:
                return samples
            await asyncio.sleep(0.1)
        raise AssertionError(f"only {samples.keys()}")

    return asyncio.run(ask())


def main() -> None:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
    one, two = busy("r1", 3), busy("r2", 4)
    replicas = [SharedMetrics(one, "app"), SharedMetrics(two, "app")]
    other = SharedMetrics(busy("r3", 1), "other app")
    try:
        for shared in replicas:
            samples = when(shared, {"r1", "r2"})
            assert samples["dat_images_total/plain", "r1"] == 3
            assert samples["dat_images_total/plain", "r2"] == 4
        one.answered("plain", 10, 0.0, None)
        assert when(replicas[0], {"r1", "r2"})["dat_images_total/plain", "r1"] == 13  # its own, as they stand
        assert when(replicas[1], {"r1", "r2"})["dat_images_total/plain", "r1"] == 13  # and from then on
        when(other, {"r3"})
        board = ray.get_actor(replicas[0].name, namespace=NAMESPACE)
        ray.kill(board)
        for shared in replicas:
            when(shared, {"r1", "r2"})
        assert ray.get_actor(replicas[0].name, namespace=NAMESPACE)._actor_id != board._actor_id
        print("made again")
    finally:
        for shared in (*replicas, other):
            shared.stop()
        ray.shutdown()


if __name__ == "__main__":
    main()
