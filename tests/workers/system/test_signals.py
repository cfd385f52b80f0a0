from __future__ import annotations

import os
import signal

import pytest

from dat_workers.system.signals import delayed_signals, handle_signals


def test_the_earlier_handler_is_back_after_the_block() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    received: list[int] = []
    with handle_signals(lambda number, _: received.append(number), signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_a_delayed_signal_arrives_when_the_block_has_ended() -> None:
    steps: list[str] = []

    def interrupted_block() -> None:
        with delayed_signals():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("the block goes on")

    with pytest.raises(KeyboardInterrupt):
        interrupted_block()
    assert steps == ["the block goes on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
