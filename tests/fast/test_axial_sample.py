"""Every fast path of axial sampling against the reference: values, both gradients, odd sizes, strides, dtypes."""

import os
import subprocess
import sys

import pytest
import torch

from tokenmix.blocks.kernels.axial_sample import axial_sample as reference
from tokenmix.fast import axial_sample as fast
from tokenmix.fast import native

# Height, width, channels, groups: single rows and columns, one channel, groups that share 1, 2, 3, 4, 8 channels.
CASES = [(5, 7, 6, 3), (1, 9, 4, 4), (9, 1, 8, 1), (2, 2, 3, 3), (7, 12, 70, 35), (3, 40, 16, 4), (33, 3, 6, 2)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-2}


@pytest.fixture
def cpp(compiled, monkeypatch):
    monkeypatch.setattr(fast, "_NATIVE", compiled)
    return fast._native_forward, fast._native_backward


@pytest.fixture(scope="module")
def triton_kernels(device):
    """The GPU kernels, on the CPU by Triton's interpreter."""
    if device != "cpu":
        pytest.skip("Triton compiles here: tests on the GPU cover it")
    from tokenmix.fast import axial_sample_triton

    return axial_sample_triton.forward, axial_sample_triton.backward


@pytest.fixture(params=["cpp", "triton_kernels"])
def kernel(request):
    return request.getfixturevalue(request.param)


def drawn(H, W, C, G, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(2, H, W, C, dtype=dtype)
    both = 3 * torch.randn(2, H, W, 2 * G, dtype=dtype)
    both.view(-1)[::5] = both.view(-1)[::5].round()  # whole distances: the slope is the right-hand one
    return x, both[..., G:]  # half of a wider tensor, as `split` makes it


def truth(x, offsets, axis, grad):
    a, b = x.detach().clone().requires_grad_(), offsets.detach().clone().requires_grad_()
    y = reference(a, b, axis)
    return (y.detach(), *torch.autograd.grad(y, (a, b), grad))


def close(ours, expected):
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    difference = (ours.double() - expected.double()).abs().max().item()
    assert difference <= TOLERANCE[ours.dtype] * max(1.0, expected.double().abs().max().item())


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(kernel, case, axis):
    x, offsets = drawn(*case)
    grad = torch.linspace(-1, 1, x.numel()).view_as(x)
    forward, backward = kernel
    for ours, expected in zip(
        (forward(x, offsets, axis), *backward(grad, x, offsets, axis)), truth(x, offsets, axis, grad), strict=True
    ):
        close(ours, expected)


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cpp_takes_every_dtype(cpp, dtype, axis):
    x, offsets = drawn(6, 5, 12, 6, dtype)
    grad = torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(x)
    forward, backward = cpp
    for ours, expected in zip(
        (forward(x, offsets, axis), *backward(grad, x, offsets, axis)), truth(x, offsets, axis, grad), strict=True
    ):
        close(ours, expected)


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize(("dtype", "other"), [(torch.float64, torch.float64), (torch.float64, torch.float32)])
def test_what_triton_cannot_compute_goes_to_the_reference(triton_kernels, dtype, other, axis):
    x, offsets = drawn(6, 5, 12, 6, dtype)
    offsets = offsets.to(other)
    grad = torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(x)
    ours = fast._triton_forward(x, offsets, axis), *fast._triton_backward(grad, x, offsets, axis)
    for mine, expected in zip(ours, truth(x, offsets, axis, grad), strict=True):
        close(mine, expected)
    wide = torch.empty(1, 2**16, 2**16, 1, device="meta")
    assert fast._suits_triton(x.float(), offsets.float()) and not fast._suits_triton(wide, wide)


def test_strided_input_is_read_right(kernel):
    x, offsets = drawn(6, 9, 8, 4)
    forward, backward = kernel
    strided = torch.empty(2, 8, 6, 9).copy_(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    turned = offsets.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert not strided.is_contiguous() and not turned.is_contiguous()
    grad = torch.randn_like(x)
    close(forward(strided, turned, "width"), reference(x, offsets, "width"))
    for ours, expected in zip(
        backward(grad, strided, turned, "height"), truth(x, offsets, "height", grad)[1:], strict=True
    ):
        close(ours, expected)


def test_every_element_is_written(kernel, monkeypatch):
    """Memory that is only reserved holds NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        x, offsets = drawn(5, 7, 6, 3)
        forward, backward = kernel
        results = [forward(x, offsets, "width"), *backward(torch.ones_like(x), x, offsets, "height")]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(r.isfinite().all() for r in results)


def test_values_outside_of_the_map_are_zero_and_what_is_no_number_stays_none(kernel):
    x, _ = drawn(3, 4, 2, 2)
    forward, _ = kernel
    far = torch.full((2, 3, 4, 2), 1e30)
    assert forward(x, far, "width").abs().max() == 0 and forward(x, -far, "height").abs().max() == 0
    assert forward(x, torch.full_like(far, float("nan")), "width").isnan().all()
    infinite = x.clone()
    infinite[:, :, 0] = float("inf")  # what is not read does not spread
    assert forward(infinite, torch.ones(2, 3, 4, 2), "width").isfinite().all()


def test_custom_op_is_sound_in_every_mode(kernels_home):
    """In a process of its own: which implementation runs is settled at import."""
    code = """
import torch, tokenmix
from tokenmix.fast import axial_sample as fast
assert fast.status()["cpu"] == ("C++", ""), fast.status()
x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
o = torch.randn(2, 5, 7, 3, dtype=torch.float64, requires_grad=True)
for axis in ("height", "width"):
    torch.library.opcheck(torch.ops.tokenmix.axial_sample, (x, o, axis))
    torch.testing.assert_close(fast.axial_sample(x, o, axis), fast.reference(x, o, axis), rtol=1e-12, atol=1e-12)
class Layer(torch.nn.Module):
    def forward(self, x, o):
        return fast.axial_sample(x, o, "width") * 2
exported = torch.export.export(
    Layer(), (x, o), dynamic_shapes=({1: torch.export.Dim("H"), 2: torch.export.Dim("W")},) * 2
)
big, far = torch.randn(2, 9, 4, 6, dtype=torch.float64), torch.randn(2, 9, 4, 3, dtype=torch.float64)
torch.testing.assert_close(exported.module()(big, far), 2 * fast.reference(big, far, "width"))
compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
torch.testing.assert_close(compiled(x, o), Layer()(x, o))
compiled(big.requires_grad_(), far.requires_grad_()).sum().backward()
assert big.grad.isfinite().all() and far.grad.isfinite().all()
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fast.axial_sample(x, o, "width")
assert counter.get_total_flops() == 4 * x.numel()
print("sound")
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernels_home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "sound", done.stderr[-3000:]


def test_without_a_library_the_reference_runs_and_the_reason_is_told(tmp_path):
    code = "from tokenmix.fast import axial_sample as f; print(f.status()['cpu'], f.axial_sample is f.reference)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "gather arithmetic" in done.stdout and "not built: tokenmix doctor --build-kernels" in done.stdout
    environment["TOKENMIX_NATIVE"] = "0"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "switched off" in done.stdout


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native.BuildError, match="false failed"):
        native.build_library()
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    with pytest.raises(native.BuildError, match="could not be run"):
        native.build_library()
    assert list((tmp_path / "tokenmix").iterdir()) == [] and native.library_path().parent == tmp_path / "tokenmix"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("case", CASES)
def test_the_op_on_a_gpu_equals_the_reference(case, axis):
    x, offsets = drawn(*case)
    grad = torch.linspace(-1, 1, x.numel()).view_as(x)
    a, b = x.cuda().requires_grad_(), offsets.cuda().requires_grad_()
    y = torch.ops.tokenmix.axial_sample(a, b, axis)
    results = (y.detach(), *torch.autograd.grad(y, (a, b), grad.cuda()))
    for ours, expected in zip(results, truth(x, offsets, axis, grad), strict=True):
        close(ours.cpu(), expected)


@pytest.mark.parametrize("axis", ["height", "width"])
def test_images_that_lie_beyond_2_31_elements_are_found(triton_kernels, axis):
    x, offsets = drawn(3, 4, 6, 3)
    wide = torch.empty(2**31 + 36, dtype=torch.bfloat16).as_strided((3, 3, 4, 3), (2**30, 12, 3, 1))  # hardly touched
    wide.copy_(offsets[[0, 1, 0]])
    x = x[[0, 1, 0]]
    close(triton_kernels[0](x, wide, axis), reference(x, wide.float(), axis))


def test_kernels_compile_for_a_gpu():
    """Here without one: what the interpreter lets pass may be no sound program."""
    pytest.importorskip("triton")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenmix.fast import axial_sample_triton as kernels
for kernel, pointers in ((kernels._forward, 3), (kernels._backward, 5)):
    names = kernel.arg_names
    signature = {name: "*fp32" if i < pointers else "i32" for i, name in enumerate(names)}
    constants = {"S": 2, "BLOCK_N": 16, "BLOCK_C": 64}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 80, 32))
print("compiled")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_maps_of_more_than_2_31_elements_are_indexed_right():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("too little memory on the GPU")
    x = torch.zeros(2**20 + 1, 1, 2, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(1, 2, 1024)
    offsets = torch.full((2**20 + 1, 1, 2, 1), 0.5, device="cuda")
    y = torch.ops.tokenmix.axial_sample(x, offsets, "width")
    close(y[-1:].cpu(), reference(x[-1:].cpu(), offsets[-1:].cpu(), "width"))
