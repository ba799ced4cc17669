"""The window attention op on the CPU, where it is the reference: gradients, tracing, FLOPs, the module through it."""

import pytest
import torch

from tokenmix.blocks.kernels.window_attention import WindowAttention
from tokenmix.fast import window_attention as fast


@pytest.mark.parametrize("with_bias", [True, False])
def test_op_is_sound_and_equals_the_reference(with_bias):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 4, 12, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.tokenmix.window_attention, (q, k, v, bias, 3, 2))
    inputs = [x for x in (q, k, v, bias) if x is not None]
    ours = torch.ops.tokenmix.window_attention(q, k, v, bias, 3, 2)
    truth = fast.reference(q, k, v, bias, 3, 2)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    grad = torch.linspace(-1, 1, truth.numel(), dtype=torch.float64).view_as(truth)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(truth, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0, 1])
def test_module_through_the_op_is_the_module(shift):
    torch.manual_seed(0)
    plain, ours = WindowAttention(3, 2, shift=shift), fast.FastWindowAttention(3, 2, shift=shift)
    torch.nn.init.normal_(plain.bias_table)
    ours.load_state_dict(plain.state_dict())
    q, k, v = (torch.randn(2, 6, 4, 12) for _ in range(3))
    torch.testing.assert_close(ours(q, k, v), plain(q, k, v))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), plain(q, k, v))


def test_flops_are_counted_and_the_status_is_told():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 6, 4, 12)
    with FlopCounterMode(display=False) as counter:
        torch.ops.tokenmix.window_attention(x, x, x, None, 3, 2)
    assert counter.get_total_flops() == 2 * 2 * (2 * 24) * 4 * 12
    assert set(fast.status()) == {"cpu", "cuda"} and fast.status()["cpu"][1]
    if not torch.cuda.is_available():
        assert fast.WindowAttention is WindowAttention
