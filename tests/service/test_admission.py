"""Slots and bytes are divided into fair shares."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from dat_service.admission import FairShares
from dat_service.settings import Settings, SettingsError, make_settings
from dat_service.worker import CodecWorker
from dat_workers.errors import Full, TooLarge, Unhealthy


def test_somebody_new_finds_room_beside_floods() -> None:
    slots = FairShares(16)
    held = dict.fromkeys("abc", 0)
    for flow in held:
        while slots.take(flow, 1):
            held[flow] += 1
    assert held["a"] == 8
    assert all(count >= 1 for count in held.values())
    assert slots.take("new", 1)
    for _ in range(held["a"]):
        slots.give("a", 1)
    assert slots.take("b", 1)


def test_nothing_is_held_in_the_end() -> None:
    shares = FairShares(100)
    assert shares.take("a", 30)
    assert shares.take("b", 70)
    assert not shares.take("c", 1)
    shares.give("a", 30)
    shares.give("b", 70)
    assert shares.take("d", 0)
    assert shares.held == 0
    assert not shares._holders  # or every peer that ever called would stay in memory
    assert shares.take("c", 100)


def test_slots_and_bytes_of_a_worker() -> None:
    mib = 1 << 20
    worker = CodecWorker(Settings(codec="identity", max_body_bytes=mib, max_held_bytes=4 * mib, max_requests=3))
    with pytest.raises(Unhealthy, match="not loaded"):
        worker.admit("a", 0)
    worker.load()
    try:
        with worker.admit("a", 4 * mib) as reservation:
            assert (worker.held, worker.held_bytes) == (0, 0)  # a promise takes nothing
            with pytest.raises(TooLarge, match="4194305 bytes is not usable; expected at most 4194304 bytes"):
                worker.admit("b", 4 * mib + 1)
            reservation.grow(2 * mib)
            assert (worker.held, worker.held_bytes) == (0, 2 * mib)
            reservation.take_slot()
            reservation.take_slot()
            assert (worker.held, worker.held_bytes) == (1, 2 * mib)
            reservation.grow(2 * mib)  # its own bytes do not stand in its way
            assert worker.held_bytes == 4 * mib
            with pytest.raises(Full, match="bytes are held"):
                worker.admit("a", 1)
            with pytest.raises(TooLarge, match="at most 4194304 bytes"):
                reservation.grow(1)
        with worker.admit("a", 2 * mib) as reservation, ExitStack() as others:
            reservation.grow(2 * mib)
            reservation.take_slot()
            other = others.enter_context(worker.admit("b", mib))
            other.take_slot()
            assert worker.held == 2
            late = others.enter_context(worker.admit("c", 0))  # there is room when its headers arrive
            others.enter_context(worker.admit("d", 0)).take_slot()
            with pytest.raises(Full, match="3 requests are held, at most 3"):
                late.take_slot()
            with pytest.raises(Full, match="3 requests are held, at most 3"):
                worker.admit("e", 0)
            others.close()
            with pytest.raises(Full):
                worker.admit("b", 2 * mib + 1)
            reservation.close()
            with pytest.raises(RuntimeError, match="reservation is closed"):
                reservation.grow(1)
        assert (worker.held, worker.held_bytes) == (0, 0)
    finally:
        worker.stop()


def test_a_request_and_its_answer_must_fit() -> None:
    with pytest.raises(SettingsError, match="max_held_bytes is 1000000"):
        make_settings(max_held_bytes=1_000_000)


def test_a_body_that_arrives_after_the_codec_was_stopped_gets_503() -> None:
    worker = CodecWorker(Settings(codec="identity"))
    worker.load()
    with worker.admit("a", 100) as reservation:
        assert worker.admitted == 1
        worker.stop()
        with pytest.raises(Unhealthy, match="the service is shutting down"):
            reservation.take_slot()
    assert (worker.admitted, worker.held, worker.held_bytes) == (0, 0, 0)
