from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import dat_client
from dat_client import Client

from .loopback import client_threads

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on threads and fork


def test_import_loads_neither_torch_nor_ray():
    code = "import sys, dat_client.wire; print(sorted({'torch', 'ray', 'fastapi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_is_that_of_the_distribution():
    project = Path(__file__).parents[2] / "client" / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == dat_client.__version__


def test_a_pickled_client_keeps_its_settings_and_opens_its_own_connections(server, images):
    with Client(server.url, timeout_s=7, retries=3, max_connections=2, api_key="k", connect_timeout_s=2) as client:
        client.discretize(images)
        client.submit(images).result(20)
        with pickle.loads(pickle.dumps(client)) as copy:
            assert repr(copy) == repr(client)
            assert copy._transport is not client._transport
            assert copy._executor is not client._executor
            assert copy.__getstate__() == client.__getstate__()
            assert np.array_equal(copy.submit(images).result(20).reconstruction, images)
    assert server.connections == 2
    assert server.headers[-1]["Authorization"] == "Bearer k"


def child_asks(client: Client, images: np.ndarray, answers: multiprocessing.SimpleQueue) -> None:
    direct = client.discretize(images).reconstruction
    submitted = client.submit(images).result(20).reconstruction
    answers.put((os.getpid(), np.array_equal(direct, images) and np.array_equal(submitted, images)))


def test_a_forked_worker_uses_its_own_connections(server, images):
    """As a DataLoader does it: with an open connection, running threads and a held lock."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with Client(server.url, timeout_s=20) as client:
        client.submit(images).result(20)
        before = server.connections
        with client._executor._shutdown_lock:
            workers = [context.Process(target=child_asks, args=(client, images + n, answers)) for n in range(3)]
            for worker in workers:
                worker.start()
        for _ in range(5):
            assert np.array_equal(client.discretize(images).reconstruction, images)
        for worker in workers:
            worker.join(30)
            assert worker.exitcode == 0
        results = [answers.get() for _ in workers]
        assert all(good for _, good in results)
        assert os.getpid() not in {pid for pid, _ in results}
        assert (
            server.connections - before == 3
        )  # one a child (its two calls follow each other), none for the parent
    ids = [request.id for request in server.requests]
    assert len(set(ids)) == len(ids)


def test_a_closed_client_stays_closed_in_a_fork(server):
    client = Client(server.url)
    client.close()
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=lambda: sys.exit(7 if client._closed.is_set() else 0))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 7


def test_threads_end_when_the_client_closes(server, images):
    before = client_threads()
    with Client(server.url) as client:
        client.submit(images).result(20)
        assert client_threads() - before
    assert client_threads() <= before
