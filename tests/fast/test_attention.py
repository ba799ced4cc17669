"""Attention between tokens in C++ against the reference: values, gradients, few and many keys, strides, the op."""

import os
import subprocess
import sys

import pytest
import torch

from tokenmix.fast import attention as fast

# Images, queries, keys, heads, channels of a head: one key, few keys, several panels of queries, more heads than are
# done together, heads of one and of odd channels.
CASES = [(2, 196, 4, 8, 18), (3, 7, 1, 2, 5), (1, 1, 70, 3, 1), (2, 50, 50, 11, 4), (1, 130, 65, 1, 64)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def cpp(compiled, monkeypatch):
    monkeypatch.setattr(fast, "_NATIVE", compiled)
    return fast


def close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert (a.double() - b).abs().max().item() <= TOLERANCE[a.dtype] * max(1.0, b.abs().max().item())


def truth(inputs, grad, heads):
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    y = fast.reference(*inputs, heads)
    return y.detach(), *torch.autograd.grad(y, inputs, grad.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_cpp_equals_the_reference(cpp, case, dtype):
    B, N, M, heads, d = case
    torch.manual_seed(0)
    q = torch.randn(B, N, 3 * heads * d, dtype=dtype)[..., : heads * d]
    k, v = torch.randn(B, M, 2 * heads * d, dtype=dtype).chunk(2, -1)
    grad = torch.randn(B, heads * d, N, dtype=dtype).transpose(1, 2)
    expected = truth((q, k, v), grad, heads)
    close((cpp._native_forward(q, k, v, heads), *cpp._native_backward(grad, q, k, v, heads)), expected)
    close(fast._gradients(grad.double(), q.double(), k.double(), v.double(), heads), expected[1:])


def test_no_queries_and_no_keys_give_nothing(cpp):
    x, none = torch.randn(2, 5, 6), torch.randn(2, 0, 6)
    assert cpp._native_forward(none, x, x, 2).shape == (2, 0, 6)
    assert cpp._native_forward(x, none, none, 2).abs().max() == 0
    for q, k in ((none, x), (x, none)):
        assert [g.shape for g in cpp._native_backward(q, q, k, k, 2)] == [q.shape, k.shape, k.shape]
        assert all(not g.any() for g in cpp._native_backward(q, q, k, k, 2))
    with pytest.raises(ValueError, match="do not attend"):
        cpp._native_forward(x, x, x[:, :4], 2)
    with pytest.raises(ValueError, match="do not attend"):
        cpp._native_backward(x[:, :4], x, x[:, :4], x[:, :4], 2)


def test_maps_windows_and_values_of_other_channels_are_taken(cpp):
    torch.manual_seed(0)
    x, k, v = torch.randn(2, 4, 3, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    torch.testing.assert_close(fast._fast_attention(x, k, v, 3), fast.reference(x, k, v, 3))
    q, k, v = x.chunk(3, -1)
    torch.testing.assert_close(fast._fast_windowed_attention(q, k, v, 2), fast.windowed_reference(q, k, v, 2))
    q, k, v = torch.randn(2, 4, 6), torch.randn(2, 5, 6), torch.randn(2, 5, 8)
    torch.testing.assert_close(fast._fast_attention(q, k, v, 2), fast.reference(q, k, v, 2))
    half = [t.bfloat16() for t in (q, k, k)]
    torch.testing.assert_close(fast._fast_attention(*half, 2), fast.reference(*half, 2))


def test_op_is_sound_in_every_mode(kernels_home):
    """In a process of its own: which implementation runs is settled at import."""
    code = """
import torch
from tokenmix.fast import attention as fast
assert fast.status()["cpu"] == ("C++", ""), fast.status()
q, k, v = (torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (7, 3, 3))
torch.library.opcheck(torch.ops.tokenmix.attention, (q, k, v, 2))
class Layer(torch.nn.Module):
    def forward(self, q, k, v):
        return fast.attention(q, k, v, 2) * 2
N, M = torch.export.Dim("N"), torch.export.Dim("M")
exported = torch.export.export(Layer(), (q, k, v), dynamic_shapes=({1: N}, {1: M}, {1: M}))
big = [torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (70, 40, 40)]
compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
for inputs in ((q, k, v), big):
    expected = 2 * fast.reference(*inputs, 2)
    for y in (exported.module()(*inputs), compiled(*inputs)):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(y.square().sum(), inputs) for y in (compiled(*inputs), expected)]
    for a, b in zip(*slopes):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fast.attention(q, k, v, 2)
assert counter.get_total_flops() == 4 * 2 * 7 * 3 * 6
for case in fast.cases(1):
    torch.testing.assert_close(case.fast(*case.inputs), case.reference(*case.inputs), rtol=1e-4, atol=1e-5)
print("sound")
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernels_home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "sound", done.stderr[-3000:]
    environment["TOKENMIX_NATIVE"] = "0"
    code = "from tokenmix.fast import attention as f; print(f.attention is f.reference, f.status()['cpu'][1])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True switched off by TOKENMIX_NATIVE=0"
