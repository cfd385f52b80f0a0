"""A training outlives its service: the process is killed, stays away, and comes back on the same port.

The service is away for 5 s. With DAT_AWAY_S=300 it is away for five minutes, with the timeouts that users have:

    DAT_AWAY_S=300 python -m pytest tests/e2e/test_outage.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from dat_service.launch import DAT, running_process
from dat_service.ports import free_port

AWAY_S = float(os.environ.get("DAT_AWAY_S", "5"))
IS_SHORT = AWAY_S < 60
ENV = {name: value for name, value in os.environ.items() if name != "DAT_AWAY_S"}

# A training in a process of its own: one line for each batch, `<position> <label> <sum of the pixels>`.
TRAINER = """
import logging, sys, torch
from dat_client import Client
from dat_client.torch import AdversarialLoader, _outage
logging.basicConfig(level="WARNING", stream=sys.stdout, format="%(message)s")
url, timeout_s, _outage.WARN_EVERY_S = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
data = [(torch.full((2, 3, 32, 32), i, dtype=torch.uint8), torch.full((2,), i)) for i in range(8)]
with Client(url, "identity", timeout_s=timeout_s) as client:
    loss = lambda x, y: (x * 0).sum()
    for batch in AdversarialLoader(data, client, loss, model=[], depth=1, random_start=0):
        print(batch.position, batch.rest[0].tolist(), round(batch.adversarial.mean().item() * 255, 3), flush=True)
        if batch.position == 2:
            print("waiting for a line", flush=True)
            sys.stdin.readline()
"""


@pytest.mark.timeout(AWAY_S + 240)
def test_a_training_outlives_its_service() -> None:
    port = free_port()
    command = [*DAT, "serve", "--port", str(port), "--codec", "identity", "--local"]
    url = f"http://127.0.0.1:{port}"
    timeouts = ("1", "1") if IS_SHORT else ("60", "60")
    lines: list[str] = []
    with ExitStack() as stack:
        first = stack.enter_context(running_process(command, url, env=ENV))
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, url, *timeouts],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV,
        )  # fmt: skip
        stack.callback(trainer.kill)
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        for line in trainer.stdout:
            lines.append(line.strip())
            if line.startswith("waiting"):
                break
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(10)
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        time.sleep(AWAY_S)
        assert trainer.poll() is None, "the training ended with its service"
        stack.enter_context(running_process(command, url, env=ENV))
        rest, _ = trainer.communicate(timeout=120)
        lines += rest.splitlines()
    assert trainer.returncode == 0, lines
    batches = [line for line in lines if line[:1].isdigit()]
    assert batches == [f"{i} [{i}, {i}] {float(i)}" for i in range(8)]
    reports = [line for line in lines if line.startswith("the service is away, waiting for at most 1800 s")]
    assert len(reports) >= (2 if IS_SHORT else AWAY_S // 60 - 1)
    assert "ConnectionRefusedError" in reports[-1]
    assert sum(line.startswith("the service answers again after") for line in lines) == 1
