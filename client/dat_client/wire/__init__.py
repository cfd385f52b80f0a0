"""Encodes and decodes messages of the Open Inference Protocol v2 with the binary tensor data extension."""

from dat_client.errors import WireError
from dat_client.wire.headers import HEADER_LENGTH
from dat_client.wire.messages import (
    Encoded,
    ErrorBody,
    Request,
    RequestedOutput,
    Response,
    decode_error,
    decode_request,
    decode_response,
    encode_error,
    encode_request,
    encode_response,
)
from dat_client.wire.tensors import DATATYPES, datatype_of, dtype_of

__all__ = [
    "DATATYPES",
    "HEADER_LENGTH",
    "Encoded",
    "ErrorBody",
    "Request",
    "RequestedOutput",
    "Response",
    "WireError",
    "datatype_of",
    "decode_error",
    "decode_request",
    "decode_response",
    "dtype_of",
    "encode_error",
    "encode_request",
    "encode_response",
]
