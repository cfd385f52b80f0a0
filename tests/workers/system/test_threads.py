"""Threads that compute beside each other."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest

from dat_workers.system.threads import DaemonThreads


def test_items_are_computed_beside_each_other_and_keep_their_order() -> None:
    both = threading.Barrier(2)

    def compute(item: int) -> int:
        both.wait(60)
        return item

    assert DaemonThreads(2, "two").map(compute, range(4)) == [0, 1, 2, 3]


def test_an_error_reaches_the_caller_and_ends_no_thread() -> None:
    threads = DaemonThreads(2, "two")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            threads.map(lambda x: 1 // x, [1, 0, 1])
    assert threads.map(lambda x: 1 // x, [1, 1]) == [1, 1]


def test_they_end_with_their_object() -> None:
    threads = DaemonThreads(2, "ending")
    assert threads.map(str, [1, 2, 3]) == ["1", "2", "3"]
    del threads
    gc.collect()
    deadline = time.monotonic() + 60
    while any(thread.name.startswith("ending") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    script = (
        "import threading\n"
        "from dat_workers.system.threads import DaemonThreads\n"
        "hung = threading.Event()\n"
        "def hang(_):\n"
        "    hung.set()\n"
        "    threading.Event().wait()\n"
        "threads = DaemonThreads(2, 'two')\n"
        "threading.Thread(target=threads.map, args=[hang, [0]], daemon=True).start()\n"
        "assert hung.wait(60)\n"
        "print('ends', flush=True)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "ends\n", "")
