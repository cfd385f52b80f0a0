"""`serve://` without Ray: the client's end and the replica's end, joined by a stand-in for the DeploymentHandle."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dat_client import (
    AsyncClient,
    Client,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    TooLarge,
    Unavailable,
    UnknownCodec,
    _repeat,
    _serve,
)
from dat_service.handle import infer_call
from dat_service.settings import Settings
from dat_service.worker import CodecWorker


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class RayActorError(RayError):
    pass


class RayServeException(Exception):
    pass


class StandInRay:
    """What `_serve.py` asks of Ray, over a worker in this process. Arrays arrive read-only, as out of the store."""

    def __init__(self, worker: CodecWorker) -> None:
        self.worker = worker
        self.payloads: list[dict[str, Any]] = []
        self.failures: list[BaseException] = []  # each is raised by one call
        self.applications = {"app"}
        self.joined = 0
        self.cancelled = 0
        self.hang = threading.Event()

    def modules(self) -> dict[str, ModuleType]:
        ray, serve, exceptions, serve_exceptions = (
            ModuleType(name) for name in ("ray", "ray.serve", "ray.exceptions", "ray.serve.exceptions")
        )
        vars(exceptions).update(RayError=RayError, RayTaskError=RayTaskError)
        vars(serve_exceptions).update(RayServeException=RayServeException)
        vars(serve).update(exceptions=serve_exceptions, get_app_handle=self.get_app_handle)
        vars(ray).update(
            serve=serve, exceptions=exceptions, is_initialized=lambda: bool(self.joined), init=self.init
        )
        return {module.__name__: module for module in (ray, serve, exceptions, serve_exceptions)}

    def init(self, **options: Any) -> None:
        assert options["address"] == "auto"
        self.joined += 1

    def get_app_handle(self, name: str) -> Any:
        if name not in self.applications:
            raise RayServeException(f"Application '{name}' does not exist.")
        return self

    @property
    def infer(self) -> Any:
        return self

    def remote(self, payload: dict[str, Any]) -> Any:
        self.payloads.append(payload)
        return StandInResponse(self, payload)


class StandInResponse:
    def __init__(self, ray: StandInRay, payload: dict[str, Any]) -> None:
        self.ray, self.payload = ray, payload

    def result(self, timeout_s: float) -> dict[str, Any]:
        failure = self.ray.failures.pop(0) if self.ray.failures else None
        if isinstance(failure, TimeoutError):
            self.ray.hang.wait(timeout_s)
        if failure is not None:
            raise failure
        for array in self.payload.get("inputs", {}).values():
            array.flags.writeable = False
        answer = asyncio.run(infer_call(self.ray.worker, self.payload))
        for array in answer["outputs"].values() if "timing" in answer else ():
            array.flags.writeable = False
        return answer

    def cancel(self) -> None:
        self.ray.cancelled += 1


@pytest.fixture(scope="module")
def worker() -> Iterator[CodecWorker]:
    worker = CodecWorker(Settings(codec="tiny-f8", max_images=64))
    worker.load()
    yield worker
    worker.stop()


@pytest.fixture
def ray(worker: CodecWorker, monkeypatch: pytest.MonkeyPatch) -> StandInRay:
    ray = StandInRay(worker)
    for name, module in ray.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_repeat, "FIRST_PAUSE_S", 0.001)
    return ray


@pytest.fixture
def client(ray: StandInRay) -> Iterator[Client]:
    with Client("serve://app", timeout_s=60) as client:
        yield client


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 3, 32, 48), np.uint8)


def test_it_answers_what_the_http_door_answers(client: Client, worker: CodecWorker, images: np.ndarray) -> None:
    gradients = np.random.default_rng(1).normal(size=images.shape).astype(np.float32)
    names = ["reconstruction", "indices", "adversarial", "adversarial_indices"]
    q = client.discretize(images.copy(), gradients, outputs=names, preset="easyrobust", alpha=4.0)
    expected = worker.discretizer
    assert expected is not None
    plain = expected.discretize(images, outputs=["reconstruction", "indices"])
    assert np.array_equal(q.reconstruction, plain["reconstruction"])
    assert np.array_equal(q.indices, plain["indices"])
    assert q.adversarial.shape == images.shape
    assert 0 < q.tokens_changed <= 1
    assert (q.codec, q.fingerprint) == ("tiny-f8", expected.fingerprint)
    assert np.array_equal(client.decode(q.indices.copy()), q.reconstruction)
    floats = client.discretize((images / 255).astype(np.float16), output_dtype="FP32").reconstruction
    assert floats.dtype == np.float32


def test_torch_and_submit_and_parts_and_profile(ray: StandInRay, images: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    with Client("serve://app", max_in_flight=2, timeout_s=60) as client, client.profile() as profile:
        q = client.submit(torch.from_numpy(images.copy())).result(60)
    assert isinstance(q.reconstruction, torch.Tensor)
    assert [len(payload["inputs"]["images"]) for payload in ray.payloads] == [1, 2]
    assert ray.joined == 1
    (call,) = profile.calls
    assert 0 < call.codec <= call.total
    assert (call.sent, call.received) == (images.nbytes, images.nbytes)


def test_questions(client: Client, worker: CodecWorker) -> None:
    assert worker.discretizer is not None
    said = client.metadata()
    assert (said["name"], said["parameters"]["fingerprint"]) == ("tiny-f8", worker.discretizer.fingerprint)
    assert client.server_metadata()["name"] == "discrete-augmentation"
    assert client.live()
    assert client.ready()
    client.wait_ready(5)


def test_async(ray: StandInRay, images: np.ndarray) -> None:
    async def main() -> None:
        async with AsyncClient("serve://app", timeout_s=60) as client:
            answers = await asyncio.gather(*(client.discretize(images[n : n + 1].copy()) for n in range(3)))
            assert all(q.reconstruction.shape == (1, 3, 32, 48) for q in answers)

    asyncio.run(main())


def test_errors_are_those_of_http(client: Client, ray: StandInRay, images: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="preset") as caught:
        client.discretize(images, preset="none")
    assert (caught.value.field, caught.value.status) == ("preset", 422)
    with pytest.raises(TooLarge, match="65 images"):
        client.discretize(np.zeros((65, 3, 8, 8), np.uint8))
    with Client("serve://app", codec="another") as other:
        for ask in (other.metadata, other.ready, lambda: other.discretize(images)):
            with pytest.raises(UnknownCodec, match="tiny-f8 is"):
                ask()
    assert len(ray.payloads) == 5  # nothing was repeated


def test_a_full_replica_is_asked_again_when_it_says(
    client: Client, worker: CodecWorker, images: np.ndarray
) -> None:
    places = [worker.admit(f"/{n}", 0) for n in range(worker.settings.max_requests)]
    with pytest.raises(Overloaded, match="requests are held") as caught:
        client.discretize(images, timeout_s=0.5)
    assert caught.value.retry_after_s == 1
    for place in places:
        place.close()
    assert client.discretize(images).reconstruction.shape == images.shape


def test_a_lost_replica_is_nobodys_error(client: Client, ray: StandInRay, images: np.ndarray) -> None:
    ray.failures += [RayActorError("The actor died"), RayServeException("unavailable"), ConnectionError("gone")]
    assert client.discretize(images).reconstruction.shape == images.shape
    assert [payload["attempt"] for payload in ray.payloads] == [1, 2, 3, 4]
    assert len({payload["id"] for payload in ray.payloads}) == 1
    left = [payload["timeout_ms"] for payload in ray.payloads]
    assert left == sorted(left, reverse=True)


def test_an_exception_of_the_replicas_code_is_repeated_eight_times(
    client: Client, ray: StandInRay, images: np.ndarray
) -> None:
    ray.failures += [RayTaskError("traceback\nTypeError: bug")] * 20
    with pytest.raises(Unavailable, match=r"9 times status 500.*RayTaskError: TypeError: bug"):
        client.discretize(images)


def test_the_timeout_cancels_the_call(client: Client, ray: StandInRay, images: np.ndarray) -> None:
    ray.failures += [TimeoutError()]
    with pytest.raises(Unavailable, match=r"timed out after timeout_s=0\.1"):
        client.discretize(images, timeout_s=0.1)
    assert ray.cancelled == 1
    ray.failures += [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        client.discretize(images)
    assert ray.cancelled == 2


def test_joining_the_cluster_is_part_of_the_timeout(
    client: Client, ray: StandInRay, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = _serve._handle

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.2)
        return join(*arguments)

    monkeypatch.setattr(_serve, "_handle", slowly)
    client.discretize(images, timeout_s=60)
    assert 0 < ray.payloads[0]["timeout_ms"] <= 59_800


def test_an_application_that_is_not_there_yet_is_waited_for(ray: StandInRay) -> None:
    ray.applications.clear()
    with Client("serve://app") as client:
        assert not client.ready()
        threading.Timer(0.3, lambda: ray.applications.add("app")).start()
        client.wait_ready(30)
        assert client.live()


def test_deadlines_reach_the_codecs_queue(ray: StandInRay, worker: CodecWorker, images: np.ndarray) -> None:
    payload = {
        "what": "infer", "codec": "tiny-f8", "id": "1", "client": "c", "timeout_ms": 0, "attempt": 1,
        "inputs": {"images": images}, "parameters": {}, "outputs": [],
    }  # fmt: skip
    answer = asyncio.run(infer_call(worker, payload))
    assert answer["error"]["status"] == 504
    assert worker.held == worker.held_bytes == 0


@pytest.mark.parametrize("payload", [{}, {"codec": "tiny-f8"}, {"codec": "tiny-f8", "what": "x"}, {"codec": 7}])
def test_what_is_no_call_is_refused_in_words(worker: CodecWorker, payload: dict[str, Any]) -> None:
    error = asyncio.run(infer_call(worker, payload))["error"]
    assert error["status"] in (404, 422, 500)
    assert error["error"]


def test_what_is_no_answer_is_a_protocol_error(
    client: Client, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (None, "text", {}, {"outputs": {}, "parameters": {}, "codec": "c"}):
        monkeypatch.setattr(StandInResponse, "result", lambda self, timeout_s, wrong=wrong: wrong)
        with pytest.raises(ProtocolError, match="not an answer"):
            client.discretize(images)


@pytest.mark.parametrize("url", ["serve://", "serve://a/b", "serve://a?x", "serve:///x"])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(InvalidRequest, match="serve://APP"):
        Client(url)
    with pytest.raises(InvalidRequest, match="api_key"):
        Client("serve://app", api_key="k")


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, images: np.ndarray) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with Client("serve://app") as client, pytest.raises(ImportError, match=r"pip install 'dat-client\[serve\]'"):
        client.discretize(images)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told(client: Client, images: np.ndarray) -> None:
    client.discretize(images)
    child = os.fork()
    if child == 0:
        try:
            client.discretize(images)
        except RuntimeError as error:
            os._exit(7 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not _serve._forked


def test_calls_are_counted_as_requests_are(client: Client, worker: CodecWorker, images: np.ndarray) -> None:
    def counted(name: str) -> float:
        return sum(
            sample.value
            for family in worker.metrics.families()
            for sample in family.samples
            if sample.name == name and set(sample.labels.values()).isdisjoint({"out", "200"})
        )

    names = ("dat_requests_total", "dat_bytes_total", "dat_refusals_total")
    before = [counted(name) for name in names]
    client.discretize(images)
    with pytest.raises(InvalidRequest):
        client.discretize(images, preset="none")
    assert [counted(name) - old for name, old in zip(names, before, strict=True)] == [1, images.nbytes, 1]
