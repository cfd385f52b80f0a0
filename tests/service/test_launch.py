"""`running_service` and `running_process`: what they start, and what is left of it."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from dat_client import Client
from dat_service.launch import StartFailed, running_process, running_service
from dat_service.processes import runs

PARENT = """
import signal, subprocess, sys, time
child = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"]
print("child", subprocess.Popen(child).pid)
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    if "stubborn" in sys.argv:
        time.sleep(600)
"""


def test_a_service_answers_while_the_block_runs() -> None:
    with running_service("--codec", "identity", "--local") as service:
        with Client(service.url, "identity") as client:
            assert client.ready()
        assert service.lines[0] == "loading identity ...\n"
        assert service.lines[1].startswith("ready after")
    assert service.process.returncode == 0
    assert service.lines[-1] == "stopped\n"


@pytest.mark.parametrize(("argument", "status"), [("polite", 0), ("stubborn", -9)])
def test_nothing_is_left_of_what_it_started(argument: str, status: int) -> None:
    with running_process([sys.executable, "-c", PARENT, argument], stop_timeout_s=1) as running:
        child = psutil.Process(int(running.lines[0].split()[1]))
        assert runs(child)
    assert running.process.returncode == status
    assert not runs(child)


def test_a_failed_start_tells_the_log() -> None:
    with pytest.raises(StartFailed, match=r"ended with status 1\n.*did you mean tiny-f8"):
        running_service("--codec", "tiny-f9", "--local").__enter__()
    silent = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    with pytest.raises(StartFailed, match=r"not ready after 2 s\nloading"):
        running_process(silent, start_timeout_s=2).__enter__()


def test_stderr_is_in_the_log_or_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    complains = [sys.executable, "-c", "import sys; print('hot', file=sys.stderr); print('ready'); input()"]
    with running_process(complains, stderr=subprocess.STDOUT) as running:
        pass
    assert "hot\n" in running.lines
    assert capfd.readouterr().err == ""
    with running_process(complains, stderr=None) as running:
        pass
    assert "hot" not in running.log
    assert "hot" in capfd.readouterr().err
