"""What stands in a file in ONNX's own types: codes, scales and zero points, by NumPy from the bytes alone.

Shares no line with what packed them. The layout is that of onnx, docs/docsgen/source/technical (int2, int4,
float4, float8): the first code of a byte lies in its lowest bits, and rows follow each other without a gap.
"""

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
# bits of a code, and whether it is two's complement; floats are bit patterns
_CODES = {
    "INT2": (2, True),
    "UINT2": (2, False),
    "INT4": (4, True),
    "UINT4": (4, False),
    "INT8": (8, True),
    "UINT8": (8, False),
    "FLOAT4E2M1": (4, False),
    "FLOAT8E4M3FN": (8, False),
    "FLOAT8E5M2": (8, False),
}


def read_codes(tensor: onnx.TensorProto) -> Array:
    """The codes (rows, rest), as integers or bit patterns."""
    bits, signed = _CODES[onnx.TensorProto.DataType.Name(tensor.data_type)]
    shape = tuple(tensor.dims)
    count = int(np.prod(shape))
    stream = np.unpackbits(np.frombuffer(tensor.raw_data, np.uint8), bitorder="little")[: count * bits]
    codes = (stream.reshape(count, bits).astype(np.int32) << np.arange(bits)).sum(axis=1)
    if signed:
        codes = codes - (codes >= 2 ** (bits - 1)) * 2**bits
    return codes.reshape(shape[0], -1) if shape else codes.reshape(1, 1)


def read_scales(tensor: onnx.TensorProto) -> Array:
    """The scales as float32, in the file's shape."""
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if kind == "FLOAT":
        return numpy_helper.to_array(tensor)
    codes = np.frombuffer(tensor.raw_data, np.uint8).reshape(tuple(tensor.dims)).astype(np.int32)
    if kind == "FLOAT8E8M0":
        return np.ldexp(np.float32(1), codes - 127)
    assert kind == "FLOAT8E4M3FN", kind
    exponent, mantissa = codes >> 3 & 15, codes & 7
    significand = mantissa + 8 * (exponent > 0)
    return np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - 10) * np.where(
        codes >> 7, -1, 1
    )
