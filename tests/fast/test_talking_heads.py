"""Talking-heads attention in C++ and as an op against the reference: values, gradients, strides, dtypes, tracing."""

import os
import subprocess
import sys

import pytest
import torch

from tokenmix.blocks.kernels.talking_heads import TalkingHeadsAttention
from tokenmix.blocks.kernels.talking_heads import talking_heads_attention as reference
from tokenmix.fast import talking_heads as fast

# Batch, queries, keys, heads, inner heads, channels of a head in keys and in values: less and more than a vector,
# exactly one, single ones, blocks of queries that do not come out even, and many keys.
CASES = [
    (2, 5, 7, 3, 5, 4, 4),
    (1, 50, 50, 2, 4, 16, 16),
    (3, 21, 21, 16, 32, 16, 16),
    (2, 1, 1, 1, 1, 1, 1),
    (2, 33, 70, 5, 3, 12, 20),
    (1, 3, 300, 2, 1, 9, 17),
    (1, 17, 40, 9, 6, 32, 8),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@pytest.fixture
def cpp(compiled, monkeypatch):
    monkeypatch.setattr(fast, "_NATIVE", compiled)
    return fast._native_forward, fast._native_backward


@pytest.fixture
def plain():
    return fast._reference_forward, fast._reference_backward


@pytest.fixture(params=["cpp", "plain"])
def kernel(request):
    return request.getfixturevalue(request.param)


def drawn(B, N, M, h, g, d, e, dtype=torch.float32):
    """q, k, v as parts of wider tensors, maps, and a gradient."""
    torch.manual_seed(0)
    q = torch.randn(B, N, 3 * h * d, dtype=dtype)[..., h * d : 2 * h * d]
    k, v = torch.randn(B, M, h * (d + e), dtype=dtype).split((h * d, h * e), -1)
    maps = (torch.randn(g, h), torch.randn(g), torch.randn(h, g), torch.randn(h))
    return (q, k, v, *(t.to(dtype) for t in maps)), torch.randn(B, N, h * e, dtype=dtype)


def truth(inputs, grad):
    """In float64, without the gradient of logit_bias, which is zero."""
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    y = reference(*inputs)
    grads = torch.autograd.grad(y, inputs, grad.double())
    assert grads[4].abs().max() < 1e-9
    return y.detach(), *grads[:4], *grads[5:]


def close(ours, expected, dtype=None):
    assert ours.shape == expected.shape and ours.isfinite().all()
    difference = (ours.double() - expected).abs().max().item()
    assert difference <= TOLERANCE[dtype or ours.dtype] * max(1.0, expected.abs().max().item())


def check(kernel, inputs, grad):
    forward, backward = kernel
    ours = forward(*inputs), *backward(grad, *inputs)
    wanted = (inputs[2], *inputs[:4], *inputs[5:])
    for mine, expected, like in zip(ours, truth(inputs, grad), wanted, strict=True):
        assert mine.dtype == like.dtype and mine.is_contiguous()
        close(mine, expected, inputs[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(kernel, case, dtype):
    check(kernel, *drawn(*case, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(kernel, dtype):
    inputs, grad = drawn(2, 6, 9, 3, 4, 5, 5, dtype)
    check(kernel, inputs, grad)
    check(kernel, (*inputs[:3], *(t.float() for t in inputs[3:])), grad)


def test_strided_input_is_read_right(kernel):
    inputs, grad = drawn(3, 6, 9, 2, 3, 16, 16)
    q, k, v = inputs[:3]
    apart = q.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    turned = k.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    spread = v[:1].expand_as(v)
    maps = (inputs[3].t().contiguous().t(), inputs[4], inputs[5].t().contiguous().t(), inputs[6])
    assert apart.stride(-1) != 1 and turned.stride(0) < turned.stride(1) and not maps[0].is_contiguous()
    check(kernel, (apart, turned, spread, *maps), torch.ones(()).expand_as(grad))


@pytest.mark.parametrize("case", [(2, 5, 7, 3, 5, 4, 4), (1, 20, 17, 2, 2, 16, 16)])
def test_every_element_is_written(cpp, case, monkeypatch):
    """Memory that is only reserved holds NaN here."""
    inputs, grad = drawn(*case)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = [cpp[0](*inputs), *cpp[1](grad, *inputs)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in results)


def test_what_is_no_number_spreads_as_far_as_it_must(cpp):
    inputs, _ = drawn(2, 20, 7, 2, 3, 4, 4)
    q = inputs[0].clone()
    q[1, 17, 0] = float("nan")
    y = cpp[0](q, *inputs[1:])
    assert y[1, 17].isnan().all() and y[0].isfinite().all() and y[1, :17].isfinite().all()


def test_large_scores_do_not_overflow(cpp):
    inputs, grad = drawn(1, 5, 6, 2, 3, 4, 4)
    # Whole numbers, so that scores are exact: the smallest error of a score of a thousand is a large one of its weight.
    whole = [(30 * t).round() for t in inputs[:2]]
    check(cpp, (*whole, inputs[2], *(t.round() for t in inputs[3:])), grad)


def test_results_do_not_depend_on_threads(cpp):
    inputs, grad = drawn(3, 37, 20, 3, 4, 8, 8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([cpp[0](*inputs), *cpp[1](grad, *inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_rows_give_zeros(cpp, batch, queries, keys):
    inputs, grad = drawn(batch, queries, keys, 2, 3, 4, 4)
    results = [cpp[0](*inputs), *cpp[1](grad, *inputs)]
    assert results[0].shape == grad.shape and all(not t.any() for t in results)


def test_op_is_sound_and_the_module_through_it_is_the_module():
    inputs = [t.detach().requires_grad_() for t in drawn(2, 5, 7, 3, 4, 4, 4, torch.float64)[0]]
    torch.library.opcheck(torch.ops.tokenmix.talking_heads_attention, inputs)
    plain, ours = TalkingHeadsAttention(3, 4).double(), fast.FastTalkingHeadsAttention(3, 4).double()
    ours.load_state_dict(plain.state_dict())
    results = []
    for layer in (plain, ours, torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")):
        y = layer(*inputs[:3])
        results.append([y, *torch.autograd.grad(y.square().sum(), [*inputs[:3], *layer.parameters()])])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_flops_are_counted_and_the_status_is_told():
    from torch.utils.flop_counter import FlopCounterMode

    inputs, _ = drawn(2, 5, 7, 3, 4, 6, 2)
    with FlopCounterMode(display=False) as counter:
        torch.ops.tokenmix.talking_heads_attention(*inputs)
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * (3 * 6 + 3 * 2 + 2 * 3 * 4)
    assert set(fast.status()) == {"cpu", "cuda"}
    for case in fast.cases(1):
        torch.testing.assert_close(case.fast(*case.inputs), case.reference(*case.inputs), rtol=1e-4, atol=1e-5)


def test_custom_op_is_sound_with_the_library(kernels_home):
    """In a process of its own: which implementation runs is settled at import."""
    code = """
import torch
from tokenmix.fast import talking_heads as fast
assert fast.status()["cpu"] == ("C++", "") and fast.TalkingHeadsAttention is fast.FastTalkingHeadsAttention
x = [torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7)]
layer = fast.TalkingHeadsAttention(3, 4).double()
torch.library.opcheck(torch.ops.tokenmix.talking_heads_attention, (*x, *layer.parameters()))
truth = fast.reference(*x, *layer.parameters())
inputs = [*x, *layer.parameters()]
wanted = torch.autograd.grad(truth.square().sum(), inputs)
N, M = torch.export.Dim("N"), torch.export.Dim("M")
exported = torch.export.export(layer, tuple(x), dynamic_shapes=({1: N}, {1: M}, {1: M})).module()
torch.testing.assert_close(exported(*x), truth, rtol=1e-12, atol=1e-12)
compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
for run in (layer, compiled):
    y = run(*x)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(y.square().sum(), inputs), wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
with torch.autocast("cpu", torch.bfloat16):
    assert layer.float()(*(t.bfloat16() for t in x)).dtype == torch.bfloat16
print("sound")
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernels_home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "sound", done.stderr[-3000:]
