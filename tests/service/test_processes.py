"""Real processes are found and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from dat_service.processes import descendants, end, mentioning, runs

# a process with a child; both go on until they are made to
FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, *sys.argv[1:]])
print(flush=True)
time.sleep(600)
"""
PATIENT = "import time; print(flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"


def family(name: str, child: str = PATIENT) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", FAMILY, "-c", child, name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    return process


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_children_and_theirs_are_found_and_ended() -> None:
    before = children()
    with family("dat-test-family", STUBBORN) as parent:
        [root] = children() - before
        assert root.pid == parent.pid
        both = descendants({root})
        assert len(both) == 2
        assert end(both, patience_s=0) == both
        assert not any(map(runs, both))


def test_orphans_are_found_by_what_they_were_told() -> None:
    name = f"dat-test-orphan-{os.getpid()}"
    with family(name) as parent:
        both = mentioning(name)
        assert len(both) == 2
        root = psutil.Process(parent.pid)
        parent.kill()
    [orphan] = mentioning(name)
    assert not descendants({root})
    assert end({orphan}, patience_s=0) == {orphan}
    assert not mentioning(name)


def test_another_process_with_the_same_number_is_not_touched() -> None:
    with family("dat-test-other") as parent:
        stranger = psutil.Process(parent.pid)
        stranger._ident = (parent.pid, 1.0)  # as if it had begun at another time
        assert not runs(stranger)
        assert not descendants({stranger})
        assert not end({stranger}, patience_s=0)
        assert parent.poll() is None
        end(mentioning("dat-test-other"), patience_s=0)


def test_those_that_end_by_themselves_are_let() -> None:
    before = children()
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert end(children() - before, patience_s=60) == set()


def test_names_that_are_no_text() -> None:
    """Any process on the machine may have such a name."""
    named = (
        "import sys, time; open('/proc/self/comm', 'wb').write(b'\\xff) S 1'); print(flush=True); time.sleep(600)"
    )
    before = children()
    with subprocess.Popen([sys.executable, "-c", named], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        [found] = children() - before
        assert found.pid == process.pid
        assert runs(found)
        end({found}, patience_s=0)
