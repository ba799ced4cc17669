"""Fast paths of depth-wise convolutions, transposed and along one axis, against torch's: values, gradients, dtypes."""

import os
import subprocess
import sys

import pytest
import torch

from tokenmix.fast import axial_conv, conv_transpose

# (height, width, channels, outputs, kernel): groups of 1, 2, 3 channels, single pixels, one output.
SPREAD = [(5, 7, 6, 3, 2), (1, 1, 3, 1, 3), (3, 4, 40, 40, 4), (2, 3, 70, 35, 1), (4, 2, 17, 17, 6)]
# (height, width, channels, taps along the height, along the width): kernels longer than the map, all block sizes.
AXIAL = [(5, 7, 6, 3, 1), (5, 7, 6, 1, 3), (1, 1, 3, 1, 11), (9, 4, 59, 11, 1), (4, 9, 59, 1, 11), (3, 2, 8, 1, 1)]
CASES = [(conv_transpose, case) for case in SPREAD] + [(axial_conv, case) for case in AXIAL]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2}
each_case = pytest.mark.parametrize(("fast", "case"), CASES, ids=lambda x: getattr(x, "__name__", "x").split(".")[-1])
each_kind = pytest.mark.parametrize(("fast", "case"), [CASES[0], CASES[-2]], ids=["conv_transpose", "axial_conv"])


@pytest.fixture
def cpp(compiled, monkeypatch):
    for fast in (conv_transpose, axial_conv):
        monkeypatch.setattr(fast, "_NATIVE", compiled)


def drawn(fast, case, dtype=torch.float32):
    """x, weight, bias, gradient, and what else the op is told."""
    torch.manual_seed(0)
    if fast is conv_transpose:
        H, W, C, D, k = case
        shapes, more = [(2, H, W, C), (C, 1, k, k), (D,), (2, H * k, W * k, D)], (D,)
    else:
        H, W, C, *taps = case
        shapes, more = [(2, H, W, C), (C, 1, *taps), (C,), (2, H, W, C)], ()
    return [torch.randn(shape, dtype=dtype) for shape in shapes], more


def check(fast, forward, backward, x, weight, bias, grad, more):
    inputs = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = fast.reference(*inputs, *more)
    wanted = [t for t in inputs if t is not None]
    truth = y.detach(), *torch.autograd.grad(y, wanted, grad.double())
    ours = forward(x, weight, bias, *more), *backward(grad, x, weight, *more)
    for mine, expected in zip(ours[: len(truth)], truth, strict=True):
        assert mine.dtype == x.dtype and mine.shape == expected.shape and mine.is_contiguous()
        difference = (mine.double() - expected).abs().max().item()
        assert difference <= TOLERANCE[x.dtype] * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE)
@each_case
def test_kernel_equals_torch(cpp, fast, case, dtype):
    (x, weight, bias, grad), more = drawn(fast, case, dtype)
    check(fast, fast._native_forward, fast._native_backward, x, weight, bias, grad, more)
    check(fast, fast._native_forward, fast._native_backward, x, weight, None, grad, more)


@each_case
def test_on_other_devices_the_op_is_torch_s(fast, case):
    tensors, more = drawn(fast, case, torch.float64)
    forward, backward = (fast._spread, fast._spread_backward) if fast is conv_transpose else (
        fast._convolve,
        fast._convolve_backward,
    )  # fmt: skip
    check(fast, forward._init_fn, backward._init_fn, *tensors, more)


@each_kind
def test_threads_share_out_rows(cpp, fast, case, monkeypatch):
    monkeypatch.setattr(fast, "_SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tensors, more = drawn(fast, case, torch.float64)
        check(fast, fast._native_forward, fast._native_backward, *tensors, more)
    finally:
        torch.set_num_threads(before)


def test_large_maps_go_to_torch(cpp, monkeypatch):
    monkeypatch.setattr(axial_conv, "_LARGE", 0)
    tensors, more = drawn(axial_conv, AXIAL[0], torch.float64)
    check(axial_conv, axial_conv._native_forward, axial_conv._native_backward, *tensors, more)


@each_kind
def test_strided_input_is_read_right(cpp, fast, case):
    (x, weight, bias, grad), more = drawn(fast, case)
    x = torch.cat((x, x), -1)[..., x.shape[-1] :]
    grad = grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    weight = weight.transpose(0, 2).contiguous().transpose(0, 2)
    assert not x.is_contiguous() and not grad.is_contiguous()
    check(fast, fast._native_forward, fast._native_backward, x, weight, bias, grad, more)


@each_kind
def test_every_element_is_written(cpp, fast, case, monkeypatch):
    """Memory that is only reserved holds NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        (x, weight, bias, grad), more = drawn(fast, case)
        results = [fast._native_forward(x, weight, bias, *more), *fast._native_backward(grad, x, weight, *more)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(r.isfinite().all() for r in results)


@pytest.mark.parametrize("empty", [0, 1])
@each_kind
def test_maps_may_be_empty(cpp, fast, case, empty):
    (x, weight, bias, grad), more = drawn(fast, case)
    x, grad = (t.narrow(empty, 0, 0) for t in (x, grad))
    assert fast._native_forward(x, weight, bias, *more).shape == grad.shape
    grads = fast._native_backward(grad, x, weight, *more)
    assert [g.shape for g in grads] == [t.shape for t in (x, weight, bias)] and not any(g.any() for g in grads)


SOUND = """
import torch, tokenmix
from tokenmix.blocks.kernels import channels_last as plain
from tokenmix.fast import axial_conv, conv_transpose
from torch.utils.flop_counter import FlopCounterMode
assert axial_conv.status()["cpu"] == ("C++ for small maps", "") and conv_transpose.status()["cpu"] == ("C++", "")
x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
big = torch.randn(2, 9, 4, 6, dtype=torch.float64, requires_grad=True)
for fast, name, settings in (
    (conv_transpose, "ConvTranspose2d", ((6, 3, 2), {"stride": 2, "groups": 3})),
    (axial_conv, "AxialConv2d", ((6, 5, "width"), {})),
    (axial_conv, "AxialConv2d", ((6, 3, "height"), {"bias": False})),
    (axial_conv, "AxialConv2d", ((6, 3, "height"), {"stride": 2})),
):
    torch._dynamo.reset()
    ours, theirs = (getattr(m, name)(*settings[0], **settings[1]).double() for m in (fast, plain))
    assert isinstance(ours, getattr(plain, name)) and type(ours) is not type(theirs)
    theirs.load_state_dict(ours.state_dict())
    if name == "ConvTranspose2d":
        torch.library.opcheck(torch.ops.tokenmix.conv_transpose, (x, ours.weight, ours.bias, 3))
    elif ours.stride == (1, 1):
        torch.library.opcheck(torch.ops.tokenmix.axial_conv, (x, ours.weight, ours.bias))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    sizes = ({1: torch.export.Dim("H", min=3), 2: torch.export.Dim("W", min=3)},)
    torch.testing.assert_close(torch.export.export(ours, (x,), dynamic_shapes=sizes).module()(big), theirs(big))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x))
    grads = [torch.autograd.grad(f(big).square().sum(), (big, *m.parameters())) for f, m in
             ((compiled, ours), (theirs, theirs))]
    torch.testing.assert_close(*grads)
    totals = []
    for layer in (ours, theirs):
        with FlopCounterMode(display=False) as counter:
            layer(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0, totals
    assert ours.to("meta")(x.to("meta")).device.type == "meta"
print("sound")
"""


def test_the_layers_are_sound_in_every_mode(kernels_home):
    """In a process of its own: which implementation runs is settled at import."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernels_home)}
    done = subprocess.run([sys.executable, "-c", SOUND], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "sound", done.stderr[-3000:]


def test_without_a_library_they_are_the_plain_layers_and_the_reason_is_told(tmp_path):
    code = """
from tokenmix.blocks.kernels import channels_last as plain
from tokenmix.fast import axial_conv, conv_transpose
print(axial_conv.status()["cpu"], conv_transpose.status()["cpu"])
print(axial_conv.AxialConv2d is plain.AxialConv2d and conv_transpose.ConvTranspose2d is plain.ConvTranspose2d)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("not built: tokenmix doctor --build-kernels") == 2
    assert done.stdout.strip().endswith("True")
