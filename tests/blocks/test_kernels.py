"""Helper layers against naive versions: outputs and every gradient, odd sizes, strided inputs, compile and export."""

import pytest
import torch

from tests.reference import atmnet, mixformer
from tokenmix.blocks.kernels.attention import attention
from tokenmix.blocks.kernels.axial_sample import axial_sample
from tokenmix.blocks.kernels.channels_last import BatchNorm2d, Conv2d, GroupNorm
from tokenmix.blocks.kernels.drop_path import DropPath
from tokenmix.blocks.kernels.padding import pad_to
from tokenmix.blocks.kernels.pooling import avg_pool, max_pool, resize
from tokenmix.blocks.kernels.window_attention import WindowAttention

# Largest difference relative to the largest value, per dtype; set once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def assert_close(ours, truth):
    tolerance = TOLERANCE[ours.dtype]
    difference = (ours.double() - truth.double()).abs().max().item()
    assert difference <= tolerance * max(1.0, truth.double().abs().max().item())


def nchw(x):
    return x.permute(0, 3, 1, 2)


def sampled_naively(x, offsets, axis):
    """The reference works on NCHW and one offset per channel."""
    full = nchw(offsets).repeat_interleave(x.shape[-1] // offsets.shape[-1], dim=1)
    return atmnet.sample_axis(nchw(x), full, 2 if axis == "height" else 3).permute(0, 2, 3, 1)


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize(
    ("size", "channels", "groups"), [((5, 7), 6, 3), ((1, 9), 4, 4), ((8, 3), 8, 1), ((2, 2), 3, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_axial_sampling_equals_the_reference_with_every_gradient(axis, size, channels, groups, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, *size, channels, dtype=dtype)
    offsets = 3 * torch.randn(2, *size, groups, dtype=dtype)
    offsets.view(-1)[::5] = offsets.view(-1)[::5].round()  # whole distances: the slope is the right-hand one
    results = []
    for function in (axial_sample, sampled_naively):
        a, b = x.clone().requires_grad_(), offsets.clone().requires_grad_()
        y = function(a, b, axis)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
        results.append((y.detach(), a.grad, b.grad))
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth)


@pytest.mark.parametrize(
    ("position", "value", "slope"),
    [
        (-2, 0, 0),
        (-1, 0, 1),
        (-0.75, 0.25, 1),
        (-0.25, 0.75, 1),
        (0, 1, 1),
        (0.5, 1.5, 1),
        (1.25, 2.25, 1),
        (3.75, 4.75, 1),
        (4, 5, -5),
        (4.25, 3.75, -5),
        (4.999, 0.005, -5),
        (5, 0, 0),
        (5.5, 0, 0),
        (1e30, 0, 0),
        (-1e30, 0, 0),
    ],
)
@pytest.mark.parametrize("axis", ["height", "width"])
def test_axial_sampling_meets_the_worked_example(position, value, slope, axis):
    shape = (1, 5, 1, 1) if axis == "height" else (1, 1, 5, 1)
    x = torch.arange(1.0, 6.0, dtype=torch.float64).view(shape)
    offsets = torch.zeros(shape, dtype=torch.float64)
    offsets.view(-1)[2] = position - 2
    offsets.requires_grad_()
    y = axial_sample(x, offsets, axis).view(-1)[2]
    y.backward()
    assert y.item() == pytest.approx(value, abs=1e-12)
    assert offsets.grad.view(-1)[2].item() == pytest.approx(slope, abs=1e-12)


def test_axial_sampling_survives_offsets_that_are_not_numbers():
    x, offsets = torch.ones(1, 4, 4, 2), torch.zeros(1, 4, 4, 2)
    offsets[0, 1, 1, 0] = float("nan")
    y = axial_sample(x, offsets, "width")
    assert y[0, 1, 1, 0].isnan() and y.isnan().sum() == 1


def test_axial_sampling_takes_strided_inputs_and_half_precision():
    torch.manual_seed(0)
    both = torch.randn(2, 6, 5, 8)
    x = torch.randn(2, 5, 6, 8).transpose(1, 2)
    a, b = both.chunk(2, dim=-1)
    assert_close(axial_sample(x, a, "width"), axial_sample(x.contiguous(), a.contiguous(), "width"))
    half = axial_sample(x.bfloat16(), b.bfloat16(), "height")
    assert half.dtype == torch.bfloat16
    assert_close(half, sampled_naively(x.bfloat16().double(), b.bfloat16().double(), "height"))


@pytest.mark.parametrize("size", [(4, 6), (2, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_window_attention_equals_the_loop_over_windows(size, biased):
    torch.manual_seed(0)
    heads, window, channels = 3, 2, 6
    layer = WindowAttention(heads, window, relative_bias=biased).double()
    if biased:
        torch.nn.init.normal_(layer.bias_table)
    q, k, v = (torch.randn(2, *size, channels, dtype=torch.float64, requires_grad=True) for _ in range(3))
    index = torch.tensor(mixformer.relative_position_index(window))
    if biased:
        bias = layer.bias_table[index].permute(2, 0, 1)
    else:
        bias = torch.zeros(heads, window**2, window**2, dtype=torch.float64)
    truth = mixformer.window_attention(nchw(q), nchw(k), nchw(v), bias, window).permute(0, 2, 3, 1)
    ours = layer(q, k, v)
    assert_close(ours.detach(), truth.detach())
    leaves = [q, k, v, *layer.parameters()]
    direction = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(truth, leaves, direction), strict=True
    ):
        assert_close(a, b)


def test_attention_equals_two_matrix_products():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 5, 6).double(), torch.randn(2, 5, 8).double()
    ours = attention(q, k, v, 2)
    for head in range(2):
        a, b, c = (
            q.flatten(1, 2)[..., head * 3 : head * 3 + 3],
            k[..., head * 3 : head * 3 + 3],
            v[..., head * 4 : head * 4 + 4],
        )
        truth = (a @ b.transpose(1, 2) / 3**0.5).softmax(-1) @ c
        assert_close(ours.flatten(1, 2)[..., head * 4 : head * 4 + 4], truth)


def test_channels_last_layers_equal_torch_and_copy_nothing():
    x = torch.randn(2, 5, 7, 6)
    for layer, plain in (
        (Conv2d(6, 4, 3, stride=2, padding=1), torch.nn.Conv2d(6, 4, 3, stride=2, padding=1)),
        (BatchNorm2d(6), torch.nn.BatchNorm2d(6)),
        (GroupNorm(3, 6), torch.nn.GroupNorm(3, 6)),
    ):
        plain.load_state_dict(layer.state_dict())
        result = layer(x)
        assert_close(result.detach(), plain(nchw(x)).permute(0, 2, 3, 1).detach())
        if not isinstance(layer, GroupNorm):
            assert result.is_contiguous()


def test_pools_pads_and_resizes():
    x = torch.arange(12.0).view(1, 3, 4, 1)
    assert max_pool(x, 2, 2, 0).flatten().tolist() == [5, 7]
    assert avg_pool(x, 3, 2, 1).flatten().tolist() == [2.5, 4.0, 6.5, 8.0]
    padded = pad_to(x, 4)
    assert padded.shape == (1, 4, 4, 1) and padded[0, 3].abs().sum() == 0 and pad_to(padded, 2) is padded
    assert resize(x, 6, 4, "nearest")[0, :, 0, 0].tolist() == [0, 0, 4, 4, 8, 8]


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = layer(x)
    per_image = y.flatten(1)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert bool((per_image == per_image[:, :1]).all()) and abs(y.mean() - 1) < 0.05
    assert layer.eval()(x) is x and DropPath(0.0).train()(x) is x
