"""Helper layers against naive versions: outputs and every gradient, odd sizes, strided inputs, compile and export."""

import math

import pytest
import torch

from tests.reference import atmnet, mat, mixformer
from tokenmix.blocks.kernels.attention import attention
from tokenmix.blocks.kernels.axial_sample import axial_sample
from tokenmix.blocks.kernels.bilinear_sample import bilinear_sample
from tokenmix.blocks.kernels.channels_last import AxialConv2d, BatchNorm2d, Conv2d, ConvTranspose2d, GroupNorm
from tokenmix.blocks.kernels.drop_path import DropPath
from tokenmix.blocks.kernels.folding import fold, unfold
from tokenmix.blocks.kernels.padding import pad_to, resize
from tokenmix.blocks.kernels.pooling import adaptive_avg_pool, avg_pool, max_pool
from tokenmix.blocks.kernels.positions import PositionEmbedding, roll
from tokenmix.blocks.kernels.token_order import gather_tokens, scatter_tokens, token_order
from tokenmix.blocks.kernels.window_attention import WindowAttention
from tokenmix.blocks.kernels.windows import space_to_depth, window_merge, window_partition

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


@pytest.mark.parametrize("size", [(6, 9), (3, 6), (3, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_shifted_windows_hide_tokens_from_the_other_end_of_the_map(size, biased):
    torch.manual_seed(0)
    heads, window, shift, d = 2, 3, 1, 2
    layer = WindowAttention(heads, window, relative_bias=biased, shift=shift).double()
    if biased:
        torch.nn.init.normal_(layer.bias_table)
    q, k, v = (torch.randn(2, *size, heads * d, dtype=torch.float64) for _ in range(3))
    truth = torch.zeros_like(q)

    def across(token):  # whether the token was rolled over, along each side that is more than one window
        return [place >= side - shift and side > window for place, side in zip(token, size, strict=True)]

    for top in range(0, size[0], window):
        for left in range(0, size[1], window):
            tokens = [(top + i, left + j) for i in range(window) for j in range(window)]
            for a in tokens:
                for h in range(heads):
                    channels = slice(h * d, h * d + d)
                    scores = []
                    for b in tokens:
                        score = (q[:, *a, channels] * k[:, *b, channels]).sum(-1) / d**0.5
                        if biased:
                            row = (a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1
                            score = score + layer.bias_table[row, h]
                        scores.append(score if across(a) == across(b) else score - 100)
                    weights = torch.stack(scores, -1).softmax(-1)
                    values = torch.stack([v[:, *b, channels] for b in tokens], 1)
                    truth[:, *a, channels] = (weights[..., None] * values).sum(1)
    assert_close(layer(q, k, v), truth)


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


def test_tokens_are_ordered_by_their_means_and_equal_ones_by_position():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (4, 50, 1), generator=generator).expand(-1, -1, 8).float()
    order = token_order(x)
    for scores, found in zip(x.mean(-1).tolist(), order.tolist(), strict=True):
        assert found == sorted(range(50), key=lambda i: (-scores[i], i))
    assert torch.equal(token_order(x.unflatten(1, (5, 10))), order) and order.dtype == torch.int64
    assert token_order(torch.zeros(2, 7, 3)).tolist() == [list(range(7))] * 2
    assert token_order(torch.tensor([-0.0, 0.0]).view(1, 2, 1)).tolist() == [[0, 1]]


def test_gathering_and_scattering_undo_each_other_with_their_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    order = token_order(x)
    assert not order.requires_grad
    gathered = gather_tokens(x, order)
    for b in range(3):
        assert torch.equal(gathered[b], x[b].flatten(0, 1)[order[b]])
    assert bool((gathered.detach().mean(-1).diff(dim=1) <= 0).all())
    back = scatter_tokens(gathered, order)
    assert torch.equal(back, x.flatten(1, 2)) and torch.equal(gather_tokens(back, order), gathered)
    direction = torch.randn(3, 35, 6, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(back, x, direction, retain_graph=True)
    assert torch.equal(gradient.flatten(1, 2), direction)
    (gradient,) = torch.autograd.grad(gathered, x, direction)
    assert torch.equal(gradient.flatten(1, 2), scatter_tokens(direction, order))


def test_token_means_are_taken_in_float32_at_least():
    # In bfloat16 the second mean would round to 256, as large as the first.
    x = torch.tensor([[256.0, 256.0, 256.0, 256.0], [256.0, 256.0, 256.0, 258.0]], dtype=torch.bfloat16)[None]
    assert token_order(x).tolist() == [[1, 0]]
    x = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_order(x), token_order(x.float()))
    tiny = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64).view(1, 2, 1)
    assert token_order(tiny).tolist() == [[1, 0]]


def test_an_order_with_means_that_are_not_numbers_is_still_an_order():
    x = torch.randn(1, 6, 2)
    x[0, 3, 1], x[0, 5, 0], x[0, 1, 0] = float("nan"), float("inf"), float("-inf")
    order = token_order(x)
    assert (
        order[0, 0] == 3 and order[0, 1] == 5 and order[0, -1] == 1 and order.sort().values.tolist() == [list(range(6))]
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 7), (6, 4)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (2, 2, 1), (3, 4, 2), (1, 2, 0)])
def test_windows_are_unfolded_and_folded_as_by_torch_with_their_gradients(size, kernel, stride, padding):
    torch.manual_seed(0)
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    windows = unfold(x, kernel, stride, padding)
    columns = torch.nn.functional.unfold(nchw(x), kernel, padding=padding, stride=stride)  # (B, C * taps, n)
    truth = columns.unflatten(1, (3, kernel**2)).permute(0, 3, 2, 1)
    assert torch.equal(windows, truth)
    weights = torch.randn_like(windows)
    weighted = (weights * windows).permute(0, 3, 2, 1).flatten(1, 2)
    back = torch.nn.functional.fold(weighted, size, kernel, padding=padding, stride=stride)
    ours = fold(weights * windows, *size, kernel, stride, padding)
    assert ours.is_contiguous()
    assert_close(ours.detach(), back.permute(0, 2, 3, 1).detach())
    direction = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad(ours, x, direction, retain_graph=True)
    assert_close(gradient, torch.autograd.grad(back, x, nchw(direction))[0])


def test_folding_ones_counts_the_windows_over_every_pixel():
    # Windows of 3 around positions 0, 2, 4 (and 6 past the end of a side of 6, which has none): by hand.
    for side, cover in ((5, [1, 2, 1, 2, 1]), (6, [1, 2, 1, 2, 1, 1])):
        n = (side - 1) // 2 + 1
        x = fold(torch.ones(1, n * n, 9, 1), side, side, 3, 2, 1)[0, :, :, 0]
        assert torch.equal(x, torch.outer(torch.tensor(cover), torch.tensor(cover)).float())


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (4, 9)])
@pytest.mark.parametrize("kernel", [1, 2, 4, 6])
def test_transposed_and_axial_convolutions_equal_sums_over_their_taps(size, kernel):
    torch.manual_seed(0)
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    layer = ConvTranspose2d(6, 3, kernel, stride=kernel, groups=3, bias=False).double()
    y = layer(x)
    assert y.shape == (2, kernel * size[0], kernel * size[1], 3) and y.is_contiguous()
    for a in range(kernel):
        for b in range(kernel):
            truth = (x * layer.weight[:, 0, a, b]).unflatten(-1, (3, 2)).sum(-1)
            assert_close(y[:, a::kernel, b::kernel].detach(), truth.detach())
    for axis, dim in (("height", 1), ("width", 2)):
        along = AxialConv2d(6, 5, axis, bias=False).double()
        taps = along.weight.flatten(1)  # (C, 5)
        truth = torch.zeros_like(x)
        for tap in range(5):
            for position in range(size[dim - 1]):
                source = position + tap - 2
                if 0 <= source < size[dim - 1]:
                    truth.select(dim, position).add_(x.select(dim, source) * taps[:, tap].detach())
        assert_close(along(x).detach(), truth)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 4)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 7)])
def test_adaptive_pooling_averages_the_bins_that_its_rule_names(size, grid):
    torch.manual_seed(0)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    y = adaptive_avg_pool(x, *grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i * size[0] // grid[0], -(-(i + 1) * size[0] // grid[0]))
            columns = slice(j * size[1] // grid[1], -(-(j + 1) * size[1] // grid[1]))
            assert_close(y[:, i, j], x[:, rows, columns].mean((1, 2)))


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (5, 7), (8, 4)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_last_window_of_a_pool_in_ceil_mode_is_cut_by_the_border(size, patch):
    x = torch.randn(1, *size, 2)
    y = max_pool(x, patch, patch, 0, ceil_mode=True)
    assert y.shape[1:3] == (-(-size[0] // patch), -(-size[1] // patch))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            window = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            assert torch.equal(y[:, i, j], window.amax((1, 2)))


def test_resizing_to_the_same_size_is_free():
    x = torch.randn(1, 3, 4, 2)
    assert resize(x, 3, 4, "bilinear") is x and resize(x, 3, 4, "nearest") is x


def bilinearly_naively(x, dx, dy, outside):
    """Cell by cell and channel by channel, from the four pixels around the position."""
    B, H, W, C = x.shape
    h, w, G = dx.shape[1:]

    def cell(b, i, j, c):
        g = c // (C // G)
        row = (i + 0.5 + dy[b, i, j, g]) * H / h - 0.5
        column = (j + 0.5 + dx[b, i, j, g]) * W / w - 0.5
        if outside == "border":
            row, column = row.clamp(0, H - 1), column.clamp(0, W - 1)
        top, left = math.floor(row.item()), math.floor(column.item())
        total = 0 * row
        for r in (top, top + 1):
            for s in (left, left + 1):
                if 0 <= r < H and 0 <= s < W:
                    total = total + x[b, r, s, c] * (1 - (row - r).abs()) * (1 - (column - s).abs())
        return total

    cells = [cell(b, i, j, c) for b in range(B) for i in range(h) for j in range(w) for c in range(C)]
    return torch.stack(cells).view(B, h, w, C)


@pytest.mark.parametrize("outside", ["border", "zeros"])
@pytest.mark.parametrize(
    ("size", "grid", "channels", "groups"),
    [
        ((4, 6), (4, 6), 4, 1),
        ((5, 7), (5, 7), 6, 3),
        ((5, 7), (3, 4), 4, 2),
        ((8, 6), (4, 3), 3, 3),
        ((3, 2), (5, 7), 2, 1),
        ((1, 5), (1, 5), 2, 2),
        ((1, 1), (2, 3), 2, 1),
    ],
)
def test_bilinear_sampling_equals_the_loop_over_cells_with_every_gradient(size, grid, channels, groups, outside):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *size, channels, generator=generator, dtype=torch.float64, requires_grad=True)
    # Distances away from pixel centres and edges, where slopes jump; some leave the map.
    dx, dy = (3 * torch.randn(2, *grid, groups, generator=generator, dtype=torch.float64) for _ in range(2))
    for distance, side, cells, dim in ((dx, size[1], grid[1], 2), (dy, size[0], grid[0], 1)):
        centre = torch.arange(cells, dtype=torch.float64).view([-1, 1] if dim == 2 else [-1, 1, 1]) + 0.5
        position = (centre + distance) * side / cells - 0.5
        position = position.floor() + (position - position.floor()).clamp(0.05, 0.95)
        distance.copy_((position + 0.5) * cells / side - centre)
        distance.requires_grad_()
    ours = bilinear_sample(x, dx, dy, outside)
    truth = bilinearly_naively(x, dx, dy, outside)
    assert_close(ours.detach(), truth.detach())
    reference = mat.sample_map(nchw(x), nchw(dx), nchw(dy), outside == "border").permute(0, 2, 3, 1)
    assert_close(reference.detach(), truth.detach())
    direction = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    inputs = (x, dx, dy)
    truths = torch.autograd.grad(truth, inputs, direction)
    for result in (ours, reference):
        for a, b in zip(torch.autograd.grad(result, inputs, direction), truths, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize(
    ("dx", "dy", "border", "zeros"),
    [
        (0, 0, 5, 5),
        (1, 0, 6, 6),
        (0, -1, 2, 2),
        (0.25, 0, 5.25, 5.25),
        (0.5, 0.5, 7, 7),
        (1.5, 0, 6, 3),
        (2, 0, 6, 0),
        (-1.75, 0, 4, 1),
        (9, 9, 9, 0),
        (1e30, -1e30, 3, 0),
    ],
)
def test_bilinear_sampling_meets_the_worked_example(dx, dy, border, zeros):
    """At the middle of 1 2 3 / 4 5 6 / 7 8 9, columns to the right and rows down."""
    x = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 3, 3, 1)
    for outside, value in (("border", border), ("zeros", zeros)):
        a, b = (torch.zeros_like(x) for _ in range(2))
        a[0, 1, 1], b[0, 1, 1] = dx, dy
        y = bilinear_sample(x, a, b, outside)
        assert y[0, 1, 1].item() == pytest.approx(value, abs=1e-12)
        assert y.view(-1)[[0, 1, 2, 3, 5, 6, 7, 8]].tolist() == pytest.approx([1, 2, 3, 4, 6, 7, 8, 9])


def test_bilinear_sampling_takes_strided_inputs_and_half_precision():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 40, 8, generator=generator).transpose(1, 2)
    dx, dy = torch.randn(2, 20, 3, 4, generator=generator).chunk(2, dim=-1)
    assert_close(
        bilinear_sample(x, dx, dy, "border"),
        bilinear_sample(x.contiguous(), dx.contiguous(), dy.contiguous(), "border"),
    )
    # Positions up to 40 would be off by a tenth of a pixel in bfloat16: they are computed in float32.
    half = bilinear_sample(x.bfloat16(), dx.bfloat16(), dy.bfloat16(), "zeros")
    truth = bilinear_sample(x.bfloat16().double(), dx.bfloat16().double(), dy.bfloat16().double(), "zeros")
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), truth, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("size", "window"), [((4, 6), 2), ((3, 9), 3), ((5, 5), 5), ((2, 3), 1)])
def test_windows_are_cut_row_by_row_and_merged_again(size, window):
    x = torch.randn(2, *size, 3)
    windows = window_partition(x, window)
    columns = size[1] // window
    assert windows.shape == (2, size[0] * columns // window, window**2, 3)
    for n in range(windows.shape[1]):
        for token in range(window**2):
            row, column = n // columns * window + token // window, n % columns * window + token % window
            assert torch.equal(windows[:, n, token], x[:, row, column])
    assert torch.equal(window_merge(windows, *size), x)
    assert torch.equal(window_merge(window_partition(x.transpose(1, 2), 1), size[1], size[0]), x.transpose(1, 2))


@pytest.mark.parametrize(("size", "side"), [((4, 6), 2), ((3, 6), 3), ((2, 5), 1)])
def test_squares_are_stacked_down_their_columns(size, side):
    x = torch.randn(2, *size, 3)
    parts = [x[:, row::side, column::side] for column in range(side) for row in range(side)]
    assert torch.equal(space_to_depth(x, side), torch.cat(parts, dim=-1))


def test_positions_are_resized_in_half_precision_too():
    layer = PositionEmbedding(6, 4, 4)
    torch.nn.init.normal_(layer.table)
    full = layer(torch.zeros(1, 5, 3, 6))
    half = layer.bfloat16()(torch.zeros(1, 5, 3, 6, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=2e-2, atol=2e-2)


def test_rolling_moves_down_and_right_around_the_edge():
    x = torch.arange(6.0).view(1, 2, 3, 1)
    assert roll(x, 1, -1).flatten().tolist() == [4, 5, 3, 1, 2, 0]
    assert roll(x, 0, 0) is x
