"""Every fast path of outlook attention against the reference: values, both gradients, odd sizes, strides, dtypes."""

import os
import subprocess
import sys

import pytest
import torch

import tokenmix
from tokenmix.blocks.kernels.folding import fold, unfold
from tokenmix.blocks.kernels.outlook_attention import outlook_attention as reference
from tokenmix.fast import outlook_attention as fast

# Height, width, channels, heads, kernel, stride: windows that overlap by more and by less than one place and that do
# not, single rows and pixels, maps smaller than a window, heads of an odd number of channels and of more than 64.
CASES = [
    (5, 7, 6, 2, 3, 2),
    (1, 9, 4, 4, 3, 1),
    (9, 1, 5, 1, 3, 3),
    (1, 1, 2, 1, 5, 2),
    (6, 8, 70, 2, 3, 2),
    (4, 5, 66, 1, 5, 4),
    (9, 6, 3, 1, 7, 7),
    (3, 5, 4, 2, 1, 1),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2}


@pytest.fixture
def cpp(compiled, monkeypatch):
    monkeypatch.setattr(fast, "_NATIVE", compiled)
    return fast._native_forward, fast._native_backward


@pytest.fixture(scope="module")
def triton_kernels(device):
    """The GPU kernels, on the CPU by Triton's interpreter."""
    if device != "cpu":
        pytest.skip("Triton compiles here: tests on the GPU cover it")
    from tokenmix.fast import outlook_attention_triton

    return outlook_attention_triton.forward, outlook_attention_triton.backward


@pytest.fixture
def written_out():
    return fast._reference_forward, fast._reference_backward


@pytest.fixture(params=["cpp", "triton_kernels", "written_out"])
def kernel(request):
    return request.getfixturevalue(request.param)


def drawn(H, W, C, heads, kernel, stride, dtype=torch.float32, batch=2):
    torch.manual_seed(0)
    logits = 3 * torch.randn(batch, -(-H // stride), -(-W // stride), heads * kernel**4, dtype=dtype)
    return logits, torch.randn(batch, H, W, C, dtype=dtype), torch.randn(batch, H, W, C, dtype=dtype)


def truth(logits, v, grad, sizes):
    """In float64."""
    a, b = (t.detach().double().requires_grad_() for t in (logits, v))
    y = reference(a, b, *sizes)
    return (y.detach(), *torch.autograd.grad(y, (a, b), grad.double()))


def close(ours, expected):
    assert ours.shape == expected.shape and ours.is_contiguous()
    difference = (ours.double() - expected.double()).abs().max().item()
    assert difference <= TOLERANCE[ours.dtype] * max(1.0, expected.abs().max().item())


def check(kernel, logits, v, grad, sizes):
    forward, backward = kernel
    results = forward(logits, v, *sizes), *backward(grad, logits, v, *sizes)
    for ours, expected, like in zip(results, truth(logits, v, grad, sizes), (v, logits, v), strict=True):
        assert ours.dtype == like.dtype
        close(ours, expected)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_chain_of_single_ops(case):
    H, W, _, heads, kernel, stride = case
    logits, v, _ = drawn(*case, torch.float64)
    weights = logits.flatten(1, 2).unflatten(-1, (heads, kernel**2, kernel**2)).softmax(-1)
    values = unfold(v, kernel, stride, kernel // 2).unflatten(-1, (heads, -1)).transpose(2, 3)
    windows = (weights @ values).transpose(2, 3).flatten(3)
    close(reference(logits, v, heads, kernel, stride), fold(windows, H, W, kernel, stride, kernel // 2))


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(kernel, case):
    check(kernel, *drawn(*case), case[3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_cpp_takes_every_dtype(cpp, case, dtype):
    check(cpp, *drawn(*case, dtype), case[3:])


@pytest.mark.parametrize("threads", [1, 3])
def test_cpp_shares_out_rows_among_threads(cpp, threads, monkeypatch):
    monkeypatch.setattr(fast, "_SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(cpp, *drawn(*CASES[0], torch.float64), CASES[0][3:])
    finally:
        torch.set_num_threads(before)


def test_what_triton_cannot_compute_goes_to_the_reference(triton_kernels):
    kernels = fast._triton_forward, fast._triton_backward
    check(kernels, *drawn(*CASES[0], torch.float64), CASES[0][3:])
    check(kernels, *drawn(*CASES[0]), CASES[0][3:])
    wide = torch.empty(1, 2**16, 2**16, 1, device="meta")
    assert not fast._suits_triton(wide, wide)


def test_strided_input_is_read_right(kernel):
    logits, v, grad = drawn(6, 9, 8, 2, 3, 2)
    turned = logits.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    third = torch.cat((v, v, v), -1)[..., 8:16]
    flat = grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not any(t.is_contiguous() for t in (turned, third, flat))
    check(kernel, turned, third, flat, (2, 3, 2))


def test_every_element_is_written(kernel, monkeypatch):
    """Memory that is only reserved holds NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        logits, v, grad = drawn(*CASES[4])
        forward, backward = kernel
        results = [forward(logits, v, *CASES[4][3:]), *backward(grad, logits, v, *CASES[4][3:])]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(r.isfinite().all() for r in results)


def test_what_is_no_number_stays_none_and_spreads_no_further_than_its_windows(kernel):
    logits, v, _ = drawn(8, 8, 4, 1, 3, 2)
    logits[0, 0, 0, 4 * 9 + 2] = float("nan")  # the middle of the first window
    v[1, 7, 7, 1] = float("nan")
    y = kernel[0](logits, v, 1, 3, 2)
    assert y[0, 0, 0].isnan().all() and y[0].isnan().sum() == 4
    # The last pixel is read by the window around (6, 6), which fills the pixels around it.
    assert y[1, 5:8, 5:8, 1].isnan().all() and y[1].isnan().sum() == 9


def test_large_logits_do_not_overflow(kernel):
    logits, v, grad = drawn(*CASES[0])
    check(kernel, 200 * logits, v, grad, CASES[0][3:])


@pytest.mark.parametrize("shape", [(0, 5, 7, 6), (2, 0, 7, 6), (2, 5, 7, 0)])
def test_maps_may_be_empty(cpp, shape):
    B, H, W, _ = shape
    logits, v = torch.randn(B, -(-H // 2), -(-W // 2), 162), torch.randn(shape)
    assert cpp[0](logits, v, 2, 3, 2).shape == shape
    grads = cpp[1](torch.randn(shape), logits, v, 2, 3, 2)
    assert [g.shape for g in grads] == [logits.shape, shape] and not any(g.any() for g in grads)


def test_custom_op_is_sound_in_every_mode(kernels_home):
    """In a process of its own: which implementation runs is settled at import."""
    code = """
import torch, tokenmix
from tokenmix.fast import outlook_attention as fast
assert fast.status()["cpu"] == ("C++", ""), fast.status()
a = torch.randn(2, 3, 4, 162, dtype=torch.float64, requires_grad=True)
v = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
torch.library.opcheck(torch.ops.tokenmix.outlook_attention, (a, v, 2, 3, 2))
torch.testing.assert_close(fast.outlook_attention(a, v, 2, 3, 2), fast.reference(a, v, 2, 3, 2), rtol=1e-12, atol=1e-12)
class Layer(torch.nn.Module):
    def forward(self, x):
        a = torch.nn.functional.pad(x, (0, 156))[:, ::2, ::2]
        return fast.outlook_attention(a, x, 2, 3, 2) * 2
exported = torch.export.export(
    Layer(), (v,), dynamic_shapes=({1: torch.export.Dim("H", min=3), 2: torch.export.Dim("W", min=3)},)
)
big = torch.randn(2, 9, 4, 6, dtype=torch.float64)
torch.testing.assert_close(exported.module()(big), Layer()(big))
compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
torch.testing.assert_close(compiled(v), Layer()(v))
compiled(big.requires_grad_()).sum().backward()
assert big.grad.isfinite().all()
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fast.outlook_attention(a, v, 2, 3, 2)
assert counter.get_total_flops() == 2 * 2 * 12 * 81 * 6
print("sound")
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernels_home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "sound", done.stderr[-3000:]


def test_without_a_library_the_reference_runs_and_the_reason_is_told(tmp_path):
    code = "from tokenmix.fast import outlook_attention as f; print(f.status(), f.outlook_attention is f.reference)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "unfold and fold" in done.stdout and "not built: tokenmix doctor --build-kernels" in done.stdout
    assert done.stdout.strip().endswith(str(not torch.cuda.is_available()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES)
def test_the_op_on_a_gpu_equals_the_reference(case):
    logits, v, grad = drawn(*case)
    a, b = logits.cuda().requires_grad_(), v.cuda().requires_grad_()
    y = torch.ops.tokenmix.outlook_attention(a, b, *case[3:])
    results = (y.detach(), *torch.autograd.grad(y, (a, b), grad.cuda()))
    for ours, expected in zip(results, truth(logits, v, grad, case[3:]), strict=True):
        close(ours.cpu(), expected)


def test_kernels_compile_for_a_gpu():
    """Here without one: what the interpreter lets pass may be no sound program."""
    pytest.importorskip("triton")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenmix.fast import outlook_attention_triton as kernels
sizes = {"HEADS": 2, "D": 24, "K": 3, "STRIDE": 2, "BLOCK_N": 64, "BLOCK_K": 16, "BLOCK_D": 32}
for kernel, pointers, turned in ((kernels._collect, 3, [False, True]), (kernels._slopes, 5, [None])):
    for way in turned:
        names = kernel.arg_names
        signature = {name: "*fp32" if i < pointers else "i32" for i, name in enumerate(names)}
        constants = sizes if way is None else sizes | {"TURNED": way}
        signature |= dict.fromkeys(constants, "constexpr")
        places = {(names.index(name),): value for name, value in constants.items()}
        for capability in (80, 90):
            triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", capability, 32))
print("compiled")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


# The op of the language


def checked(tmp_path, call, before="a = x |> dwconv(3, stride = 2) |> pointwise(162)"):
    path = tmp_path / "probe.yaml"
    path.write_text(
        "tokenmix: 1\nname: probe\ninput: [6, 5, 7]\nstages:\n  - body: probe_block()\ndefinitions: |\n"
        f"  block probe_block(x):\n      {before}\n      return {call}\n"
    )
    return [f.message for f in tokenmix.load(path).findings]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("outlook_attention(a, x; heads = 2, kernel = 3, stride = 2)", None),
        ("outlook_attention(a, x; heads = 2, kernel = 3)", "take logits of map (C=162, H=5, W=7), got"),
        ("outlook_attention(a, x; heads = 1, kernel = 3, stride = 2)", "take logits of map (C=81, H=3, W=4), got"),
        ("outlook_attention(a, x; heads = 4, kernel = 3, stride = 2)", "6 channels do not split evenly over 4 heads"),
        ("outlook_attention(a, x; heads = 2, kernel = 3, stride = 4)", "a stride of 1 to 3, the kernel; got 2 and 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, call, message):
    found = checked(tmp_path, call)
    assert found == [] if message is None else message in found[0]
