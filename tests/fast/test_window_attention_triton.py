"""Window attention on the GPU against the reference: values, all gradients, odd sizes, strides, dtypes."""

import os
import subprocess
import sys

import pytest
import torch

from tokenmix.blocks.kernels.window_attention import WindowAttention, abstract_window_attention

pytest.importorskip("triton")

from tokenmix.fast import window_attention_triton as fast

# Height, width, heads, channels of a head, window: rows and columns of windows, a single one, one head, heads of an odd
# number of channels, windows of one token, and one that takes several stretches of queries.
CASES = [
    (2, 4, 2, 4, 2),
    (3, 6, 3, 12, 3),
    (10, 5, 1, 16, 5),
    (7, 7, 2, 18, 7),
    (1, 2, 2, 3, 1),
    (4, 4, 1, 32, 4),
    (12, 12, 1, 8, 12),
]
TOLERANCE = {torch.float64: 5e-6, torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def drawn(H, W, heads, d, window, dtype=torch.float32, batch=2):
    """Queries, keys and values as thirds of one tensor, a bias, and a gradient."""
    torch.manual_seed(0)
    count = window * window
    qkv = torch.randn(batch, H, W, 3 * heads * d, dtype=dtype)
    bias = torch.randn(1, heads, count, count)
    return *qkv.chunk(3, -1), bias, torch.randn(batch, H, W, heads * d, dtype=dtype)


def truth(q, k, v, bias, grad, heads, window, shift=0):
    """In float64; the bias is taken as it is and not from a table."""
    layer = WindowAttention(heads, window, relative_bias=False, shift=shift)
    inputs = [t.detach().cpu().double().requires_grad_() for t in (q, k, v) + (() if bias is None else (bias,))]
    layer.gathered = None if bias is None else inputs[3]
    y = layer(*inputs[:3])
    return y.detach(), *torch.autograd.grad(y, inputs, grad.cpu().double())


def results(q, k, v, bias, grad, heads, window, shift=0):
    grads = fast.backward(grad, None, q, k, v, bias, None, heads, window, shift)
    y, none = fast.forward(q, k, v, bias, None, heads, window, shift)
    assert none is None
    assert y.is_contiguous() and all(t.is_contiguous() and t.dtype == q.dtype for t in grads[:3])
    assert y.dtype == q.dtype
    assert (grads[3] is None) if bias is None else (grads[3].dtype == torch.float32)
    return y, *(t for t in grads if t is not None)


def check(q, k, v, bias, grad, heads, window, device, shift=0):
    moved = [None if t is None else t.to(device) for t in (q, k, v, bias, grad)]
    expected = truth(q, k, v, bias, grad, heads, window, shift)
    close(results(*moved, heads, window, shift), expected, q.dtype)


def close(results, expected, dtype):
    for ours, true in zip(results, expected, strict=True):
        assert ours.shape == true.shape
        difference = (ours.cpu().double() - true).abs().max().item()
        assert difference <= TOLERANCE[dtype] * max(1.0, true.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_kernels_with_an_abstract_token_equal_the_reference(device, case, dtype):
    q, k, v, _, grad = drawn(*case, dtype)
    heads, window = case[2], case[4]
    token, grad_tokens = torch.randn(q.shape[-1], dtype=dtype), torch.randn(2, *windows(q, window), dtype=dtype)
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v, token)]
    expected = abstract_window_attention(*inputs, heads, window)
    slopes = torch.autograd.grad(expected, inputs, (grad.double(), grad_tokens.double()))
    q, k, v, token, grad, grad_tokens = (t.to(device) for t in (q, k, v, token, grad, grad_tokens))
    ours = fast.forward(q, k, v, None, token, heads, window, 0)
    grads = fast.backward(grad, grad_tokens, q, k, v, None, token, heads, window, 0)
    assert all(t.dtype == dtype and t.is_contiguous() for t in (*ours, *grads[:3])) and grads[3].dtype == torch.float32
    close((*ours, *grads), (*(t.detach() for t in expected), *slopes), dtype)


def windows(q, window):
    return (q.shape[1] // window) * (q.shape[2] // window), q.shape[3]


@pytest.mark.parametrize("case", [c for c in CASES if c[4] > 1])
def test_kernels_for_rolled_maps_equal_the_reference(device, case):
    q, k, v, bias, grad = drawn(*case)
    check(q, k, v, bias, grad, case[2], case[4], device, shift=case[4] // 2)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(device, case, has_bias):
    q, k, v, bias, grad = drawn(*case)
    check(q, k, v, bias if has_bias else None, grad, case[2], case[4], device)


def test_the_table_of_the_layer_gets_its_gradient(device):
    """The whole way round: the gradient of the bias goes on into the table it was gathered from."""
    q, k, v, _, grad = (t.to(device) for t in drawn(6, 3, 2, 4, 3, batch=1))
    layer = WindowAttention(2, 3).to(device)
    torch.nn.init.normal_(layer.bias_table)
    expected = torch.autograd.grad(layer(q, k, v), layer.bias_table, grad)[0]
    bias = layer.bias()
    ours = torch.autograd.grad(bias, layer.bias_table, fast.backward(grad, None, q, k, v, bias, None, 2, 3, 0)[3])[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_is_taken(device, dtype):
    q, k, v, bias, grad = drawn(2, 4, 2, 12, 2, dtype, batch=1)
    check(q, k, v, bias, grad, 2, 2, device)
    check(q, k, v, bias.to(dtype), grad, 2, 2, device)


def test_strided_input_is_read_right(device):
    q, k, v, bias, grad = drawn(4, 6, 1, 4, 2)
    # Channels apart, rows and columns swapped, and one number for all.
    apart = q.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    turned = k.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    spread = v[:1, :1].expand_as(v)
    ones = torch.ones(()).expand_as(grad)
    table = bias.transpose(2, 3).contiguous().transpose(2, 3)
    assert apart.stride(-1) != 1 and turned.stride(1) < turned.stride(2) and not table.is_contiguous()
    check(apart, turned, spread, table, ones, 1, 2, device)


@pytest.mark.parametrize(("case", "programs"), [((2, 6, 1, 4, 2), 1), ((2, 6, 1, 4, 2), 4), ((12, 12, 1, 4, 12), 1)])
def test_the_gradient_of_the_bias_is_summed_over_windows_and_programs(device, case, programs, monkeypatch):
    """Few programs for more windows, in no even share; both where sums are held and where they lie in memory."""
    monkeypatch.setattr(fast, "_PROGRAMS", programs * case[2])
    q, k, v, bias, grad = drawn(*case)
    check(q, k, v, bias, grad, case[2], case[4], device)
    first, second = (results(*(t.to(device) for t in (q, k, v, bias, grad)), case[2], case[4]) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_for_partial_sums_is_bounded(device, monkeypatch):
    monkeypatch.setattr(fast, "_PARTIAL", 2 * 2 * 4**2)
    q, k, v, bias, grad = drawn(2, 6, 2, 4, 2)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: made.append(shape) or empty(*shape, **options))
    results(*(t.to(device) for t in (q, k, v, bias, grad)), 2, 2)
    monkeypatch.undo()
    assert (2, 2, 4, 4) in made  # of 6 windows
    monkeypatch.setattr(fast, "_PARTIAL", 1)
    check(q, k, v, bias, grad, 2, 2, device)


@pytest.mark.parametrize("case", [(3, 6, 1, 5, 3), (12, 12, 1, 4, 12)])
def test_every_element_is_written(device, case, monkeypatch):
    """Memory that is only reserved holds NaN here."""
    q, k, v, bias, grad = (t.to(device) for t in drawn(*case, batch=1))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        with_bias = results(q, k, v, bias, grad, case[2], case[4])
        without = results(q, k, v, None, grad, case[2], case[4])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (*with_bias, *without))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_lies_beside_a_head_or_a_window_does_not_get_in(device):
    """NaN everywhere but in one head of one window, which is read and written as if it were alone."""
    q, k, v, bias, grad = (t.to(device) for t in drawn(3, 6, 2, 5, 3))
    inside = torch.zeros_like(q, dtype=torch.bool)
    inside[1, :, 3:, :5] = True
    wild = [t.masked_fill(~inside, float("nan")) for t in (q, k, v)]
    ours = results(*wild, bias, grad.masked_fill(~inside, float("nan")), 2, 3)
    calm = results(q, k, v, bias, grad, 2, 3)
    for a, b in zip(ours[:4], calm[:4], strict=True):
        assert torch.equal(a[inside], b[inside]) and a[~inside].isnan().all()


def test_large_scores_do_not_overflow(device):
    q, k, v, bias, grad = drawn(4, 2, 2, 4, 2, batch=1)
    # Whole numbers, so that scores are exact: the smallest error of a score of a thousand is a large one of its weight.
    q, k, bias = (30 * q).round(), (30 * k).round(), (100 * bias).round()
    check(q, k, v, bias, grad, 2, 2, device)


def test_an_empty_batch_gives_empty_maps_and_no_gradient_of_the_bias(device):
    q, k, v, bias, grad = (t.to(device) for t in drawn(4, 2, 2, 4, 2, batch=0))
    y, *grads = results(q, k, v, bias.requires_grad_(), grad, 2, 2)
    assert y.shape == q.shape and grads[3].abs().max() == 0 and grads[3].shape == bias.shape


def test_windows_and_heads_that_do_not_come_out_even_are_refused(device):
    q, k, v, bias, grad = (t.to(device) for t in drawn(4, 6, 2, 4, 2))
    for heads, window in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match="not divided"):
            fast.forward(q, k, v, None, None, heads, window, 0)
        with pytest.raises(ValueError, match="not divided"):
            fast.backward(grad, None, q, k, v, bias, None, heads, window, 0)


def test_whether_tiles_fit_is_told(device):
    """Windows of 7 do on every GPU, windows of 32 with heads of 256 channels on none."""
    small, large = torch.empty(1, 7, 7, 32, device=device), torch.empty(1, 32, 32, 256, device=device)
    assert fast.fits(small, 1, 7) and fast.fits(large, 1, 32) == (device == "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [(56, 56, 3, 32, 7), (14, 28, 12, 24, 14), (32, 32, 4, 64, 8), (32, 16, 2, 32, 16)])
def test_maps_of_real_size_on_a_gpu(device, case, dtype):
    """More windows than programs, and tiles as large as they get."""
    q, k, v, bias, grad = drawn(*case, dtype, batch=16 if case[4] == 7 else 2)
    if not fast.fits(q.to(device), case[2], case[4]):
        pytest.skip("this GPU is too small")
    check(q, k, v, bias, grad, case[2], case[4], device)


def test_kernels_compile_for_a_gpu():
    """Here without one: what the interpreter lets pass may be no sound program."""
    code = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenmix.fast import window_attention_triton as kernels
constants = {"HEADS": 2, "SIDE": 7, "COUNT": 49, "D": 18, "SCALE": 0.2, "BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32}
for kernel, last in ((kernels._forward, "gathered"), (kernels._backward, "partial")):
    names = kernel.arg_names
    for kind, more in ((tl.float32, {"SHIFT": 3, "HAS_BIAS": True, "HAS_TOKEN": 0}),
                       (tl.bfloat16, {"SHIFT": 0, "HAS_BIAS": False, "HAS_TOKEN": 1})):
        chosen = constants | more | {"KIND": kind}
        pointer = "*fp32" if kind is tl.float32 else "*bf16"
        signature = {name: pointer if i <= names.index(last) else "i32" for i, name in enumerate(names)}
        signature |= {"partial": "*fp32"} if last == "partial" else {}
        signature |= dict.fromkeys(chosen, "constexpr")
        places = {(names.index(name),): value for name, value in chosen.items()}
        for target in (80, 90):
            triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", target, 32))
print("compiled")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
