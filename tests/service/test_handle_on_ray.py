"""`Client("serve://APP")` on a real Ray Serve, in a process: python -m tests.service.test_handle_on_ray"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_trainers_in_the_cluster() -> None:
    environment = os.environ | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "as a task: equal" in done.stdout
    assert "replica killed: no error" in done.stdout


def main() -> None:
    import ray
    from ray import serve

    from dat_client import Client, InvalidRequest, UnknownCodec

    ray.init(
        address="local", num_cpus=3, include_dashboard=False, configure_logging=False, log_to_driver=False,
        object_store_memory=400_000_000,
    )  # fmt: skip
    serve.start(proxy_location="Disabled")

    @serve.deployment(name="codec", num_replicas=1, ray_actor_options={"num_cpus": 1})
    class Replica:
        def __init__(self) -> None:
            from dat_service.settings import Settings
            from dat_service.worker import CodecWorker

            self.worker = CodecWorker(Settings(codec="identity"))
            self.worker.load()

        async def infer(self, payload: dict[str, Any]) -> dict[str, Any]:
            from dat_service.handle import infer_call

            return await infer_call(self.worker, payload)

        async def end(self) -> None:
            os._exit(1)

    try:
        handle = serve.run(Replica.bind(), name="app", route_prefix=None)
        images = np.random.default_rng(0).integers(0, 256, (128, 3, 224, 224), np.uint8)
        with Client("serve://app", codec="identity", timeout_s=120) as client:
            client.wait_ready(60)
            assert client.metadata()["name"] == "identity"
            with client.profile() as profile:
                for _ in range(10):
                    assert np.array_equal(client.discretize(images).reconstruction, images)
            print(profile)
            with pytest.raises(InvalidRequest, match="preset"):
                client.discretize(images, preset="none")
            with Client("serve://app", codec="other") as other, pytest.raises(UnknownCodec):
                other.ready()

            @ray.remote(num_cpus=0)
            def trainer(mine: np.ndarray) -> bool:
                with Client("serve://app", codec="identity", timeout_s=60, max_in_flight=2) as own:
                    answers = [own.submit(mine + n) for n in range(4)]
                    return all(
                        np.array_equal(answer.result(60).reconstruction, mine + n)
                        for n, answer in enumerate(answers)
                    )

            assert all(ray.get([trainer.remote(images[:8] + n) for n in range(2)], timeout=120))
            print("as a task: equal")

            handle.end.remote()
            begun = time.monotonic()
            for n in range(20):
                assert np.array_equal(client.discretize(images[:4] + n).reconstruction, images[:4] + n)
            print(f"replica killed: no error, 20 calls in {time.monotonic() - begun:.1f} s")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
