"""A service that is away: the training waits for it and says so, and ends only after `outage_s`."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from dat_client import Client, Unavailable
from dat_client.torch import AdversarialLoader, _outage, adversarial, straight_through
from dat_client.torch._outage import Outages

BATCHES = [(torch.full((2, 3, 8, 8), i, dtype=torch.uint8), torch.full((2,), i)) for i in range(8)]
ANSWERED_AGAIN = "the service answers again after"


def attack(images: Tensor, *rest: Any) -> Tensor:
    return images.sum()


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.url, timeout_s=0.3) as client:
        yield client


def away(server: Any, fault: str, seconds: float) -> None:
    """Lets every request fail from now on for some seconds."""
    server.every = fault
    timer = threading.Timer(seconds, lambda: setattr(server, "every", ""))
    timer.daemon = True
    timer.start()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("status 503 0.01", "503: ordered"),
        ("drop before reading", "closed connection without response"),
        ("hang", "timed out"),
    ],
)
def test_a_loader_waits_for_the_service(server, client, caplog, monkeypatch, depth, fault, cause) -> None:
    monkeypatch.setattr(_outage, "WARN_EVERY_S", 0.4)
    loader = iter(AdversarialLoader(BATCHES, client, attack, model=[], depth=depth, random_start=0))
    batches = [next(loader) for _ in range(3)]
    begun = time.monotonic()
    away(server, fault, 1.5)
    batches += list(loader)
    assert time.monotonic() - begun > 1
    assert [batch.position for batch in batches] == list(range(8))
    for i, batch in enumerate(batches):
        assert batch.rest[0].tolist() == [i, i]
        assert torch.equal(batch.adversarial, torch.full((2, 3, 8, 8), i / 255))
    messages = [record.getMessage() for record in caplog.records if record.name == "dat_client"]
    assert {record.levelno for record in caplog.records if record.name == "dat_client"} == {logging.WARNING}
    reports = [message for message in messages if message.startswith("the service is away")]
    assert 2 <= len(reports) <= 5
    assert all("waiting for at most 1800 s (outage_s)" in message for message in reports)
    assert any(cause in message for message in reports)
    assert len([message for message in messages if message.startswith(ANSWERED_AGAIN)]) == 1


def test_single_batches_wait_too(server, client, caplog) -> None:
    x, _ = BATCHES[3]
    for call in (
        lambda: adversarial(client, x, attack, model=[], random_start=0).adversarial,
        lambda: straight_through(client, x),
    ):
        expected = call()
        away(server, "drop before reading", 0.8)
        assert torch.equal(call(), expected)
        assert ANSWERED_AGAIN in caplog.records[-1].getMessage()


def test_after_outage_s_the_failure_is_raised_with_what_was_tried(server, client) -> None:
    loader = iter(AdversarialLoader(BATCHES, client, attack, model=[], prefetch=0, outage_s=1))
    next(loader)
    server.every = "drop before reading"
    begun = time.monotonic()
    with pytest.raises(Unavailable, match=r"timeout_s=0\.3") as caught:
        next(loader)
    assert 1 <= time.monotonic() - begun < 4
    note, position = caught.value.__notes__
    assert re.fullmatch(r"the service stayed away: attempts \d\d+, seconds 1 \(outage_s=1\)", note)
    assert position == "AdversarialLoader: batch 1, Q(x) and the gradient there"


@pytest.mark.parametrize("fault", ["status 500", "status 408"])
def test_what_is_no_outage_ends_the_training_at_once(server, fault: str) -> None:
    with Client(server.url, timeout_s=20) as client:
        loader = iter(AdversarialLoader(BATCHES, client, attack, model=[]))
        next(loader)
        server.every = fault
        with pytest.raises(Unavailable, match=f"times {fault}") as caught:
            list(loader)
        assert [note[:24] for note in caught.value.__notes__] == [
            "AdversarialLoader: batch"
        ]  # no word of an outage


def test_a_service_that_never_answered_is_not_waited_for(server, client) -> None:
    server.every = "drop before reading"
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        next(iter(AdversarialLoader(BATCHES, client, attack, model=[])))
    assert time.monotonic() - begun < 3


def test_outage_s_0_ends_the_training_after_one_timeout(server, client) -> None:
    x, _ = BATCHES[0]
    adversarial(client, x, attack, model=[])
    server.every = "drop before reading"
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        adversarial(client, x, attack, model=[], outage_s=0)
    assert time.monotonic() - begun < 1


def test_an_answer_that_arrives_just_after_the_time_of_a_warning_is_taken(monkeypatch) -> None:
    class Late(Future[str]):
        def result(self, timeout: float | None = None) -> str:
            try:
                return super().result(timeout)
            except TimeoutError:
                self.set_result("answer")
                raise

    monkeypatch.setattr(_outage, "WARN_EVERY_S", 0.05)
    future = Late()
    timer = threading.Timer(0.2, lambda: future.done() or future.set_result("answer"))
    timer.start()
    assert Outages(None, 1.0).result(future) == "answer"
    timer.join()


def test_a_long_call_is_reported_before_its_timeout(caplog, monkeypatch) -> None:
    monkeypatch.setattr(_outage, "WARN_EVERY_S", 0.1)
    future: Future[int] = Future()
    threading.Timer(0.35, lambda: future.set_result(7)).start()
    assert Outages(object(), 10).result(future) == 7
    assert 2 <= len([r for r in caplog.records if r.getMessage().startswith("no answer for ")]) <= 3
    own_timeout: Future[int] = Future()
    own_timeout.set_exception(TimeoutError("its own"))
    with pytest.raises(TimeoutError, match="its own"):
        Outages(object(), 10).result(own_timeout)
