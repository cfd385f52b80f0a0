"""schemathesis tries every operation of /openapi.json with requests that its schema allows and that it forbids."""

from __future__ import annotations

import contextlib
import os
from collections import Counter

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from benchmarks.processes import dat_serve

CODEC = "identity"
EXAMPLES = int(os.environ.get("DAT_FUZZ_N", "10000")) // 40


def examine(url: str, examples: int) -> Counter[int]:
    """Counts the statuses of `examples` requests an operation and mode. Fails for a 5xx without Retry-After."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: Counter[int] = Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v2/models/{codec}/infer", "/v1/reconstruct", "/v2"} <= {operation.path for operation in operations}
    with requests.Session() as session:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=examples,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def send(case: schemathesis.Case) -> None:
                    if "codec" in (case.path_parameters or {}) and statuses.total() % 4:
                        case.path_parameters["codec"] = CODEC  # random names give 404 alone
                    reply = case.call(base_url=url, session=session, timeout=60)
                    statuses[reply.status_code] += 1
                    assert reply.status_code < 500 or "Retry-After" in reply.headers, case.as_curl_command()

                with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
                    send()
    return statuses


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arguments", [["--local"], []], ids=["local", "ray"])
def test_many_requests_of_every_operation(arguments: list[str]) -> None:
    with dat_serve("--codec", CODEC, *arguments) as service:
        statuses = examine(service.url, EXAMPLES)
    print("\nschemathesis, by status:", dict(sorted(statuses.items())))
    assert statuses[200] > 0
    assert statuses.total() > 4 * EXAMPLES
