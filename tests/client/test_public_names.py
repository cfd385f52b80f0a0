"""The names that users of dat_client may import: adding or removing one is a decision, made here."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from dat_client import errors

PUBLIC = {
    "dat_client": {
        "AsyncClient", "Client", "CodecChanged", "DatError", "Discretized", "InvalidDataset", "InvalidRequest",
        "Overloaded", "ProtocolError", "TooLarge", "Unauthorized", "Unavailable", "UnknownCodec", "WireError",
        "__version__",
    },
    "dat_client.wire": {
        "DATATYPES", "HEADER_LENGTH", "Encoded", "ErrorBody", "Request", "RequestedOutput", "Response", "WireError",
        "datatype_of", "decode_error", "decode_request", "decode_response", "dtype_of", "encode_error",
        "encode_request", "encode_response",
    },
    "dat_client.torch": {"Adversarial", "AdversarialBatch", "AdversarialLoader", "adversarial", "straight_through"},
    "dat_client.webdataset": {"load", "prepared", "read_manifest", "read_settings", "view_of"},
}  # fmt: skip
EXCEPTIONS = {
    "CodecChanged", "DatError", "InvalidDataset", "InvalidRequest", "Overloaded", "ProtocolError", "TooLarge",
    "Unauthorized", "Unavailable", "UnknownCodec", "WireError",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_exported_names(name: str) -> None:
    if name in ("dat_client.torch", "dat_client.webdataset"):
        pytest.importorskip(name.removeprefix("dat_client."))
    module = importlib.import_module(name)
    assert set(module.__all__) == PUBLIC[name]
    assert all(hasattr(module, exported) for exported in module.__all__)


def test_names_of_the_exceptions() -> None:
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert {name for name, value in classes.items() if issubclass(value, Exception)} == EXCEPTIONS


@pytest.mark.filterwarnings("ignore")  # Lightning's own imports warn
def test_lightning_has_two_names() -> None:
    pytest.importorskip("pytorch_lightning")
    alias, module = (importlib.import_module(name) for name in LIGHTNING)
    assert alias.__all__ == ["DiscreteAdversarialTraining"]
    assert alias.DiscreteAdversarialTraining is module.DiscreteAdversarialTraining


LIGHTNING = ("dat_client.lightning", "dat_client.integrations.lightning")


@pytest.mark.parametrize("name", LIGHTNING)
def test_without_lightning_the_error_names_module_and_package(name: str) -> None:
    code = f"import sys; sys.modules['pytorch_lightning'] = None; import {name}"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = "ImportError: dat_client.integrations.lightning needs Lightning: pip install pytorch-lightning"
    assert failed.stderr.strip().endswith(message)
