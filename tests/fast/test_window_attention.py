"""Window attention in C++ against the reference: values, gradients, odd sizes, strides, dtypes, the ops, the module."""

import os
import subprocess
import sys

import pytest
import torch

from tokenmix.blocks.kernels.window_attention import WindowAttention
from tokenmix.fast import window_attention as fast

# Height, width, heads, channels of a head, window, shift: rows and columns of windows, a single one, heads of one and
# of odd channels, that fill vectors and do not, more than are done together, windows of one token and large ones.
CASES = [
    (14, 21, 4, 8, 7, 0),
    (7, 7, 32, 8, 7, 3),
    (6, 3, 2, 18, 3, 1),
    (10, 5, 1, 16, 5, 2),
    (12, 24, 3, 5, 12, 5),
    (4, 6, 3, 1, 2, 1),
    (1, 2, 2, 40, 1, 0),
    (9, 9, 11, 3, 3, 2),
    (16, 16, 1, 3, 16, 0),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.fixture
def cpp(compiled, monkeypatch):
    monkeypatch.setattr(fast, "_NATIVE", compiled)
    return fast


def drawn(H, W, heads, d, window, shift=0, dtype=torch.float64, batch=2):
    """Queries, keys and values as thirds of one tensor, a bias, an abstract token, gradients of the two results."""
    torch.manual_seed(0)
    C, count = heads * d, window * window
    q, k, v = torch.randn(batch, H, W, 3 * C, dtype=dtype).chunk(3, -1)
    bias, abstract = torch.randn(1, heads, count, count, dtype=dtype), torch.randn(C, dtype=dtype)
    tokens = torch.randn(batch, (H // window) * (W // window), C, dtype=dtype)
    return (q, k, v, bias, abstract), (torch.randn(batch, H, W, C, dtype=dtype), tokens)


def truth(function, inputs, grads):
    """Values and gradients by autograd, in float64."""
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    y = function(*inputs)
    y = y if isinstance(y, tuple) else (y,)
    grads = torch.autograd.grad(y, inputs, [g.double() for g in grads])
    return *(t.detach() for t in y), *grads


def close(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max().item() <= TOLERANCE[a.dtype] * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_cpp_equals_the_reference(cpp, case, has_bias, dtype):
    (q, k, v, bias, _), (grad, _) = drawn(*case, dtype)
    heads, window, shift = case[2], *case[4:]
    inputs = (q, k, v, bias) if has_bias else (q, k, v)
    bias = bias if has_bias else None
    y, none = cpp._native_forward(q, k, v, bias, None, heads, window, shift)
    grads = cpp._native_backward(grad, None, q, k, v, bias, None, heads, window, shift)
    expected = truth(lambda q, k, v, bias=None: fast.reference(q, k, v, bias, heads, window, shift), inputs, (grad,))
    assert none is None and y.is_contiguous() and all(t.is_contiguous() and t.dtype == dtype for t in grads)
    close((y, *grads[: len(inputs)]), expected)
    plain = fast._gradients(grad.double(), None, *(t if t is None else t.double() for t in (q, k, v, bias)), None,
                            heads, window, shift)  # fmt: skip
    close(plain[: len(inputs)], expected[1:])
    if dtype == torch.float32:  # results do not change from run to run
        again = cpp._native_backward(grad, None, q, k, v, bias, None, heads, window, shift)
        assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_cpp_with_an_abstract_token_equals_the_reference(cpp, case, dtype):
    (q, k, v, _, abstract), grads = drawn(*case, dtype)
    heads, window = case[2], case[4]
    results = cpp._native_forward(q, k, v, None, abstract, heads, window, 0)
    slopes = cpp._native_backward(*grads, q, k, v, None, abstract, heads, window, 0)
    expected = truth(lambda *inputs: fast.abstract_reference(*inputs, heads, window), (q, k, v, abstract), grads)
    assert all(t.is_contiguous() and t.dtype == dtype for t in (*results, *slopes))
    close((*results, *slopes), expected)
    exact = [t.double() for t in (*grads, q, k, v)]
    close(fast._gradients(*exact, None, abstract.double(), heads, window, 0), expected[2:])


def test_the_abstract_token_asks_every_window_and_is_not_asked():
    (q, k, v, _, abstract), _ = drawn(4, 6, 3, 2, 2)
    y, tokens = fast.abstract_reference(q, k, v, abstract, 3, 2)
    torch.testing.assert_close(y, fast.reference(q, k, v, None, 3, 2))
    for n in range(6):
        top, left = n // 3 * 2, n % 3 * 2
        for c in (slice(0, 2), slice(2, 4), slice(4, 6)):
            keys, values = (x[:, top : top + 2, left : left + 2, c].flatten(1, 2) for x in (k, v))
            weights = (keys @ abstract[c] * 2**-0.5).softmax(1)
            torch.testing.assert_close(tokens[:, n, c], (weights[:, None] @ values)[:, 0])


@pytest.mark.parametrize("threads", [1, 3])
def test_every_element_is_written_whatever_the_threads(cpp, threads, monkeypatch):
    """Memory that is only reserved holds NaN here."""
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    try:
        (q, k, v, bias, abstract), grads = drawn(6, 9, 5, 5, 3, dtype=torch.float32)
        results = [
            *cpp._native_forward(q, k, v, None, abstract, 5, 3, 0),
            *cpp._native_backward(*grads, q, k, v, None, abstract, 5, 3, 0),
            cpp._native_forward(q, k, v, bias, None, 5, 3, 1)[0],
            *cpp._native_backward(grads[0], None, q, k, v, bias, None, 5, 3, 1),
        ]
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    assert all(r.isfinite().all() for r in results)
    close(results[6:7], truth(lambda *x: fast.reference(*x, 5, 3, 1), (q, k, v, bias), grads[:1])[:1])


def test_strided_input_is_read_right(cpp):
    (q, k, v, bias, abstract), (grad, _) = drawn(4, 6, 2, 4, 2)
    # Channels apart, rows and columns swapped, one number for all; a bias that lies key by key.
    apart = q.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    turned = k.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    spread, ones = v[:1, :1].expand_as(v), torch.ones((), dtype=torch.float64).expand_as(grad)
    table = bias.transpose(2, 3).contiguous().transpose(2, 3)
    assert apart.stride(-1) != 1 and turned.stride(1) < turned.stride(2) and not table.is_contiguous()
    y, _ = cpp._native_forward(apart, turned, spread, table, None, 2, 2, 1)
    grads = cpp._native_backward(ones, None, apart, turned, spread, table, None, 2, 2, 1)
    expected = truth(lambda *x: fast.reference(*x, 2, 2, 1), (q, k, v[:1, :1].expand_as(v), bias), (ones,))
    close((y, *grads), expected)
    every_other = torch.stack([abstract, abstract + 1], -1)[..., 0]
    close(
        cpp._native_forward(apart, turned, spread, None, every_other, 2, 2, 0),
        [t.detach() for t in fast.abstract_reference(q, k, spread, abstract, 2, 2)],
    )


def test_what_lies_beside_a_head_or_a_window_does_not_get_in_and_nan_stays(cpp):
    """NaN everywhere but in one head of one window, which is read and written as if it were alone."""
    (q, k, v, bias, _), (grad, _) = drawn(3, 6, 2, 5, 3, dtype=torch.float32)
    inside = torch.zeros_like(q, dtype=torch.bool)
    inside[1, :, 3:, :5] = True
    wild = [t.masked_fill(~inside, float("nan")) for t in (q, k, v)]

    def results(grad, *maps):
        y, _ = cpp._native_forward(*maps, bias, None, 2, 3, 0)
        return y, *cpp._native_backward(grad, None, *maps, bias, None, 2, 3, 0)[:3]

    ours, calm = results(grad.masked_fill(~inside, float("nan")), *wild), results(grad, q, k, v)
    for a, b in zip(ours, calm, strict=True):
        assert torch.equal(a[inside], b[inside]) and a[~inside].isnan().all()


def test_large_scores_do_not_overflow_and_hidden_keys_have_no_weight(cpp):
    (q, k, v, bias, _), (grad, _) = drawn(4, 2, 2, 4, 2, dtype=torch.float32)
    # Whole numbers, so that scores are exact: the smallest error of a score of a thousand is a large one of its weight.
    q, k, bias = (30 * q).round(), (30 * k).round(), (100 * bias).round()
    y, _ = cpp._native_forward(q, k, v, bias, None, 2, 2, 0)
    grads = cpp._native_backward(grad, None, q, k, v, bias, None, 2, 2, 0)
    close((y, *grads), truth(lambda *x: fast.reference(*x, 2, 2), (q, k, v, bias), (grad,)))
    bias[..., 1] = float("-inf")
    y, _ = cpp._native_forward(q, k, v, bias, None, 2, 2, 0)
    close((y,), (fast.reference(q.double(), k.double(), v.double(), bias.double(), 2, 2),))


def test_empty_batches_and_uneven_windows(cpp):
    (q, k, v, bias, abstract), (grad, tokens) = drawn(4, 2, 2, 4, 2, batch=0)
    assert cpp._native_forward(q, k, v, bias, None, 2, 2, 0)[0].shape == q.shape
    assert cpp._native_forward(q, k, v, None, abstract, 2, 2, 0)[1].shape == (0, 2, 8)
    assert cpp._native_backward(grad, None, q, k, v, bias, None, 2, 2, 0)[3].abs().max() == 0
    assert cpp._native_backward(grad, tokens, q, k, v, None, abstract, 2, 2, 0)[3].abs().max() == 0
    assert all(t.shape[0] == 0 for t in fast.abstract_reference(q, k, v, abstract, 2, 2))
    with pytest.raises(ValueError, match="divide"):
        cpp._native_forward(q, k, v, None, None, 2, 3, 0)
    with pytest.raises(ValueError, match="divide"):
        cpp._native_forward(q, k, v[:, :2], None, None, 2, 2, 0)
    with pytest.raises(ValueError, match="a bias is of"):
        cpp._native_forward(q, k, v, bias[..., :2], None, 2, 2, 0)


@pytest.mark.parametrize("shift", [0, 1])
def test_module_through_the_op_is_the_module(shift):
    torch.manual_seed(0)
    plain, ours = WindowAttention(3, 2, shift=shift), fast.FastWindowAttention(3, 2, shift=shift)
    torch.nn.init.normal_(plain.bias_table)
    ours.load_state_dict(plain.state_dict())
    q, k, v = (torch.randn(2, 6, 4, 12) for _ in range(3))
    torch.testing.assert_close(ours(q, k, v), plain(q, k, v))
    slopes = [torch.autograd.grad(m(q, k, v).square().sum(), m.bias_table)[0] for m in (ours, plain)]
    torch.testing.assert_close(*slopes)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), plain(q, k, v))
    half = [t.bfloat16() for t in (q, k, v)]
    torch.testing.assert_close(ours.bfloat16()(*half), plain.bfloat16()(*half), rtol=0.04, atol=0.01)
    ours.prepare_for_inference()
    torch.testing.assert_close(ours(*half), plain(*half), rtol=0.04, atol=0.01)


SOUND = """
import torch
from tokenmix.fast import window_attention as fast
assert fast.status()["cpu"][0] == EXPECTED, fast.status()
op, abstract_op = torch.ops.tokenmix.window_attention, torch.ops.tokenmix.abstract_window_attention
torch.manual_seed(0)
q, k, v = (torch.randn(2, 6, 4, 12, dtype=torch.float64, requires_grad=True) for _ in range(3))
bias = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
token = torch.randn(12, dtype=torch.float64, requires_grad=True)
for shift in (0, 1):
    torch.library.opcheck(op, (q, k, v, bias, 3, 2, shift))
    torch.testing.assert_close(op(q, k, v, bias, 3, 2, shift), fast.reference(q, k, v, bias, 3, 2, shift))
torch.library.opcheck(op, (q, k, v, None, 3, 2, 0))
torch.library.opcheck(abstract_op, (q, k, v, token, 3, 2))
results = [f(q, k, v, token, 3, 2) for f in (abstract_op, fast.abstract_reference)]
slopes = [torch.autograd.grad((y.square().sum(), t.square().sum()), (q, k, v, token)) for y, t in results]
for a, b in zip((*results[0], *slopes[0]), (*results[1], *slopes[1])):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
class Layer(torch.nn.Module):
    def forward(self, q, k, v, bias, token):
        y, tokens = abstract_op(q, k, v, token, 3, 2)
        return op(y, k, v, bias, 3, 2, 0) * 2, tokens
def truth(q, k, v, bias, token):
    y, tokens = fast.abstract_reference(q, k, v, token, 3, 2)
    return fast.reference(y, k, v, bias, 3, 2) * 2, tokens
H, W = (2 * torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
exported = torch.export.export(Layer(), (q, k, v, bias, token), dynamic_shapes=({1: H, 2: W},) * 3 + (None,) * 2)
big = [torch.randn(2, 8, 10, 12, dtype=torch.float64, requires_grad=True) for _ in range(3)]
for a, b in zip(exported.module()(*big, bias, token), truth(*big, bias, token)):
    torch.testing.assert_close(a, b)
compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
for maps in ((q, k, v), big):
    for a, b in zip(compiled(*maps, bias, token), truth(*maps, bias, token)):
        torch.testing.assert_close(a, b)
sum(t.sum() for t in compiled(*big, bias, token)).backward()
assert all(t.grad.isfinite().all() for t in (*big, bias, token))
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    op(q, k, v, None, 3, 2, 0)
    abstract_op(q, k, v, token, 3, 2)
assert counter.get_total_flops() == 4 * (2 * 24 + 2 * 30) * 4 * 12
for case in fast.cases(1):
    torch.testing.assert_close(case.fast(*case.inputs), case.reference(*case.inputs), rtol=1e-4, atol=1e-5)
print("sound")
"""


@pytest.mark.parametrize("native", [True, False])
def test_custom_ops_are_sound_in_every_mode(kernels_home, tmp_path, native):
    """In a process of its own: which implementation runs is settled at import."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernels_home if native else tmp_path)}
    code = SOUND.replace("EXPECTED", '"C++"' if native else '"fused attention on copies"')
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "sound", done.stderr[-3000:]
    if not native and not torch.cuda.is_available():
        code = "from tokenmix.fast import window_attention as f; print(f.WindowAttention is f.kernels.WindowAttention)"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "True"
