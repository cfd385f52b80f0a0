"""A codec that changes while a run goes on gives a warning."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest

from dat_client import CodecChanged


def test_a_codec_that_changes_is_told_once_for_each_change(client, server, images):
    answers: list[str] = []
    server.change = lambda answer: {**answer, "parameters": {"fingerprint": answers.pop(0)}}

    def warnings_for(*fingerprints: str) -> list[str]:
        answers.extend(fingerprints)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            while answers:
                client.discretize(images)
        assert {warning.filename for warning in caught} <= {__file__}
        assert {warning.category for warning in caught} <= {CodecChanged}
        return [str(warning.message) for warning in caught]

    assert warnings_for("a", "a") == []
    message = "codec 'tiny-f8' changed: it answered with fingerprint a before, with b now"
    assert warnings_for("b", "b", "b") == [message]
    assert len(warnings_for("c", "b", "c", "b", "c", "b")) == 2  # b to c and back, as while replicas are replaced
    answers.append("d")
    with pytest.warns(CodecChanged, match="with d now"):
        client.decode(np.zeros((1, 2, 2), int))


def test_a_copy_remembers_the_codec(client, server, images):
    client.discretize(images)
    server.change = lambda answer: {**answer, "parameters": {"fingerprint": "new"}}
    with pickle.loads(pickle.dumps(client)) as copy, pytest.warns(CodecChanged, match="sha256:1d"):
        copy.discretize(images)


def test_the_warning_can_be_made_an_error(client, server, images):
    client.discretize(images)
    server.change = lambda answer: {**answer, "parameters": {"fingerprint": "new"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CodecChanged)
        with pytest.raises(CodecChanged):
            client.discretize(images)
