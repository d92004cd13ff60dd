"""The affine path against ONNX (reference evaluator, onnxruntime) and torch's fake quantization."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from recoup.numerics import (
    E2M1,
    E4M3,
    E5M2,
    IntFormat,
    QParams,
    QuantSpec,
    dequantize,
    fake_quantize,
    per_channel,
    per_group,
    per_tensor,
    quantize,
)

INT8, UINT8 = IntFormat(8), IntFormat(8, signed=False)
INT4, UINT4 = IntFormat(4), IntFormat(4, signed=False)
INT2, UINT2 = IntFormat(2), IntFormat(2, signed=False)

# format, ONNX's element type, numpy's, granularity, ONNX's attributes, opset, zero points to draw from
ONNX = [
    (INT8, TensorProto.INT8, np.int8, per_tensor, {}, 19, (0, 1, -7, 127, -128)),
    (UINT8, TensorProto.UINT8, np.uint8, per_tensor, {}, 19, (0, 1, 101, 128, 255)),
    (INT8, TensorProto.INT8, np.int8, per_channel, {"axis": 0}, 19, (0, 1, -7, 33)),
    (UINT8, TensorProto.UINT8, np.uint8, per_channel, {"axis": 0}, 19, (1, 101, 128)),
    (INT4, TensorProto.INT4, ml_dtypes.int4, per_channel, {"axis": 0}, 21, (0, 1, -3)),
    (INT4, TensorProto.INT4, ml_dtypes.int4, per_group(16), {"axis": 1, "block_size": 16}, 21, (0, 1, -3)),
    (UINT4, TensorProto.UINT4, ml_dtypes.uint4, per_group(16), {"axis": 1, "block_size": 16}, 21, (7, 8)),
    (INT2, TensorProto.INT2, ml_dtypes.int2, per_group(16), {"axis": 1, "block_size": 16}, 25, (0, -1)),
    (UINT2, TensorProto.UINT2, ml_dtypes.uint2, per_group(16), {"axis": 1, "block_size": 16}, 25, (1, 2)),
    (E4M3, TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, per_tensor, {}, 19, (0,)),
    (E4M3, TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, per_channel, {"axis": 0}, 19, (0,)),
    (E5M2, TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2, per_tensor, {}, 19, (0,)),
    (E2M1, TensorProto.FLOAT4E2M1, ml_dtypes.float4_e2m1fn, per_tensor, {}, 23, (0,)),
]


def onnx_id(row: Any) -> str:
    return f"{row[0].name}-{row[3]}"


def inputs(spec: QuantSpec, scale: torch.Tensor) -> torch.Tensor:
    """Plain numbers, exact ties, and numbers far outside, in units of the scale."""
    rows, columns = 8, 64
    ties = torch.randint(-40, 40, (rows, columns)) / 2
    wide = torch.randn(rows, columns) * spec.format.hi
    units = torch.where(torch.rand(rows, columns) < 0.5, ties, wide)
    return units * scale.repeat_interleave(rows // scale.shape[0], 0).repeat_interleave(
        columns // scale.shape[1], 1
    )


def graph(row: Any, scale: torch.Tensor, zero_point: torch.Tensor) -> onnx.ModelProto:
    _, kind, dtype, granularity, attributes, opset, _ = row
    shape = () if not attributes else (-1,) if granularity == per_channel else tuple(scale.shape)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], **attributes),
    ]
    size = [8, 64]
    made = helper.make_graph(
        nodes,
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [
            helper.make_tensor_value_info("codes", kind, size),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, size),
        ],
        [
            numpy_helper.from_array(scale.numpy().reshape(shape), "scale"),
            numpy_helper.from_array(zero_point.numpy().reshape(shape).astype(dtype), "zero"),
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def case(row: Any, pow2: bool) -> tuple[QuantSpec, QParams, torch.Tensor, onnx.ModelProto]:
    grid, _, _, granularity, _, _, zeros = row
    rule = "affine" if isinstance(grid, IntFormat) else "narrow"
    spec = QuantSpec(format=grid, granularity=granularity, scale_rule=rule, ranges="static")
    shape = granularity.scale_shape(8, 64)
    scale = 2.0 ** torch.randint(-6, 3, shape) if pow2 else torch.rand(shape) + 0.01
    zero_point = torch.tensor(zeros, dtype=torch.int32)[torch.randint(len(zeros), shape)]
    qparams = QParams(scale=scale, zero_point=zero_point if rule == "affine" else None)
    return spec, qparams, inputs(spec, scale), graph(row, scale, zero_point)


@pytest.mark.parametrize("pow2", [True, False], ids=["ties", "any-scale"])
@pytest.mark.parametrize("row", ONNX, ids=onnx_id)
def test_onnx_reference(row: Any, pow2: bool) -> None:
    for _ in range(5):
        spec, qparams, x, model = case(row, pow2)
        codes, values = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
        ours = quantize(x, qparams, spec)
        as_stored = codes if isinstance(spec.format, IntFormat) else codes.view(np.uint8)
        np.testing.assert_array_equal(ours.numpy().astype(int), np.asarray(as_stored).astype(int))
        np.testing.assert_array_equal(dequantize(ours, qparams, spec).numpy(), values)


# Its CPU provider has no FLOAT4E2M1.
@pytest.mark.parametrize("pow2", [True, False], ids=["ties", "any-scale"])
@pytest.mark.parametrize("row", [row for row in ONNX if row[0] is not E2M1], ids=onnx_id)
def test_onnxruntime(row: Any, pow2: bool) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    for _ in range(5):
        spec, qparams, x, model = case(row, pow2)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (values,) = session.run(["values"], {"x": x.numpy()})
        # Its 4 and 2 bit codes have no numpy type; the values of two codes differ, so they tell as much.
        np.testing.assert_array_equal(fake_quantize(x, qparams, spec).numpy(), values)


@pytest.mark.parametrize("grid", [INT8, UINT8, INT4, UINT4, IntFormat(3), IntFormat(8, narrow=True)], ids=str)
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_torch_fake_quantize(grid: IntFormat, zero: int) -> None:
    spec = QuantSpec(format=grid, granularity=per_tensor, scale_rule="affine", ranges="static")
    # Powers of two: torch multiplies by 1 / scale, which then is the same; see the test below.
    for exponent in (-7, -2, 0, 3):
        scale = torch.tensor([[2.0**exponent]])
        qparams = QParams(scale=scale, zero_point=torch.tensor([[zero]], dtype=torch.int32))
        ours = inputs(spec, scale).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        grad = torch.randn(8, 64)
        y = fake_quantize(ours, qparams, spec)
        y.backward(grad)
        oracle = torch.fake_quantize_per_tensor_affine(
            theirs, 2.0**exponent, zero, int(grid.lo), int(grid.hi)
        )
        oracle.backward(grad)
        assert torch.equal(y, oracle)
        assert torch.equal(ours.grad, theirs.grad)
        assert 0 < int((ours.grad == 0).sum()) < ours.numel()  # the inputs reach both sides of the clip


def test_torch_fake_quantize_per_channel() -> None:
    spec = QuantSpec(format=INT8, granularity=per_channel, scale_rule="affine", ranges="static")
    scale = 2.0 ** torch.arange(-4, 4).float()[:, None]
    zero_point = torch.tensor([0, 1, -1, 7, -100, 127, -128, 33], dtype=torch.int32)[:, None]
    ours = inputs(spec, scale).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    grad = torch.randn(8, 64)
    y = fake_quantize(ours, QParams(scale=scale, zero_point=zero_point), spec)
    y.backward(grad)
    oracle = torch.fake_quantize_per_channel_affine(theirs, scale[:, 0], zero_point[:, 0], 0, -128, 127)
    oracle.backward(grad)
    assert torch.equal(y, oracle)
    assert torch.equal(ours.grad, theirs.grad)


def test_divide_or_multiply() -> None:
    """The trap: x / s (ONNX, compressed-tensors, here) and x * (1 / s) (torch, torchao) differ."""
    spec = QuantSpec(format=INT8, granularity=per_tensor, scale_rule="narrow", ranges="static")
    scale = np.float32(0.1)
    x = (np.arange(-254, 255) / 2).astype(np.float32) * scale  # as near to the ties as float32 gets
    x = np.concatenate([x, np.nextafter(x, np.float32(99)), np.nextafter(x, np.float32(-99))])
    divided = np.rint(x / scale).clip(-128, 127)
    multiplied = np.rint(x * (np.float32(1) / scale)).clip(-128, 127)
    assert (divided != multiplied).any()

    qparams = QParams(scale=torch.tensor([[scale]]))
    ours = quantize(torch.tensor(x)[None], qparams, spec)
    np.testing.assert_array_equal(ours[0].numpy(), divided)
    theirs = torch.fake_quantize_per_tensor_affine(torch.tensor(x), float(scale), 0, -128, 127)
    np.testing.assert_array_equal(torch.round(theirs / scale).numpy(), multiplied)


def test_zero_point_is_added_after_rounding() -> None:
    # x / s = 0.5, zero point 1: ONNX gives 0 + 1; rint(x / s + zp), as torch.quantize_per_tensor, gives 2.
    spec = QuantSpec(format=INT8, granularity=per_tensor, scale_rule="affine", ranges="static")
    qparams = QParams(scale=torch.ones(1, 1), zero_point=torch.ones(1, 1, dtype=torch.int32))
    x = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
    assert quantize(x, qparams, spec).tolist() == [[-1, 1, 1, 3, 3]]
